"""What every test shares: the hypothesis profiles."""

import os

from hypothesis import settings

settings.register_profile("default", max_examples=50, deadline=None)
# The same examples on every run, so that a change fails for what it changes and not by chance.
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("long", max_examples=5000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))
