"""How long hypothesis goes on: "short" in the suite, "long" by `python -m tests.fuzz`."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "short", max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("long", settings.get_profile("short"), max_examples=20_000, derandomize=False)
settings.load_profile("short")
