"""The coefficients of tanh_of (rnn2bin/runtime/native/kernels/elementwise.h): x P(x²) / Q(x²) with the smallest largest relative error.

    python scripts/fit_tanh.py

With Q fixed in the bound, the largest error is a linear program in the coefficients; a few rounds settle. Beyond MOST tanh is 1 in float32.
"""

import numpy as np
from scipy.optimize import linprog

MOST, DEGREE_P, DEGREE_Q, ROUNDS = 7.90531110763549805, 4, 3, 12


def fit() -> tuple[np.ndarray, np.ndarray, float]:
    """P's coefficients, Q's (the first is 1), the largest relative error."""
    x = np.concatenate([MOST / 2 * (1 - np.cos(np.pi * (np.arange(600) + 0.5) / 600)), np.linspace(1e-3, MOST, 600)])
    s, wanted, q = (x / MOST) ** 2, np.tanh(x) / x, np.ones_like(x)
    powers_p, powers_q = s[:, None] ** np.arange(DEGREE_P + 1), s[:, None] ** np.arange(1, DEGREE_Q + 1)
    count = DEGREE_P + 1 + DEGREE_Q
    for _ in range(ROUNDS):
        off = np.hstack([powers_p, -wanted[:, None] * powers_q])
        allowed = (wanted * q)[:, None]
        found = linprog(
            np.r_[np.zeros(count), 1],
            A_ub=np.vstack([np.hstack([off, -allowed]), np.hstack([-off, -allowed])]),
            b_ub=np.r_[wanted, -wanted],
            bounds=[(None, None)] * count + [(0, None)],
        ).x
        q = 1 + powers_q @ found[DEGREE_P + 1 : count]
    scale = MOST ** (2.0 * np.arange(DEGREE_P + 1))
    return found[: DEGREE_P + 1] / scale, np.r_[1, found[DEGREE_P + 1 : count] / scale[1 : DEGREE_Q + 1]], found[-1]


def main() -> None:
    p, q, error = fit()
    print("P", *(float(c).hex() for c in p))
    print("Q", *(float(c).hex() for c in q))
    print(f"largest relative error {error:.1e}")


if __name__ == "__main__":
    main()
