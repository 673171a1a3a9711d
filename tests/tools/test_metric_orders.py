import numpy as np
from metric_orders import DRAWS, orders


def test_orders_are_compared_with_the_largest_count_and_with_fd():
    values = {
        "FD": {5: [[3.0, 3.0], [1.0, 1.0], [2.0, 2.0]], 10: [[3.0], [2.0], [1.0]]},
        "MIND": {5: [[1.0, 9.0], [2.0, 8.0], [3.0, 4.0]], 10: [[9.0], [6.0], [5.0]]},
    }
    rows = {tuple(row[:3]): tuple(map(float, row[3:])) for row in orders(values)}
    assert rows["FD", "5", "the same"] == (0.333, 0.333)  # one of three pairs is reversed
    assert rows["FD", "5", "other"] == (0.333, 0.333)  # the same for both halves
    assert rows["FD", "10", "the same"] == rows["MIND", "10", "the same"] == (1, 1)
    assert ("FD", "10", "other") not in rows
    assert rows["MIND", "5", "the same"] == (-1, -1)
    choices = [(a, b, c) for a in (1.0, 9.0) for b in (2.0, 8.0) for c in (3.0, 4.0)]
    taus = [np.mean([np.sign(a - b), np.sign(a - c), np.sign(b - c)]) for a, b, c in choices]
    np.testing.assert_allclose(rows["MIND", "5", "other"], np.mean(taus), atol=4 * np.std(taus) / np.sqrt(DRAWS))
