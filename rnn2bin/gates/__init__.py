"""How a gate is made discrete (estimators) and how fast (schedules): pure functions, no state."""
