"""One profile for all properties: examples are derived from the test, so that a run gives what the last one gave."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "properties",
    derandomize=True,
    deadline=None,  # the first example imports and compiles
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # what fixtures make here isn't changed by examples
)
settings.load_profile("properties")
