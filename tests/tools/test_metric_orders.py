from metric_orders import orders


def test_orders_are_compared_with_the_largest_count_and_with_fd():
    values = {"FD": {5: [3.0, 1.0, 2.0], 10: [3.0, 2.0, 1.0]}, "MIND": {5: [1.0, 2.0, 3.0], 10: [9.0, 6.0, 5.0]}}
    assert orders(values) == [
        ["FD", "5", "0.333", "0.333"],  # one of three pairs the other way round
        ["FD", "10", "1.000", "1.000"],
        ["MIND", "5", "-1.000", "-1.000"],
        ["MIND", "10", "1.000", "1.000"],
    ]
