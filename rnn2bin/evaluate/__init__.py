"""What the conversion lost and what it saved: metrics, parity, density, the report."""
