"""One profile for all property tests: examples are derived from the test, so that every run gives the same result."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "properties",
    derandomize=True,
    deadline=None,  # the first example imports and compiles
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # no example changes what a fixture returned
)
settings.load_profile("properties")
