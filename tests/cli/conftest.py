"""The pipelines' fixtures, for the commands that export and send them."""

from tests.pipelines.conftest import hub, save

__all__ = ["hub", "save"]
