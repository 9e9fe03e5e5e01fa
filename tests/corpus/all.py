"""Every attack."""

from tests.corpus import contents, images, inner, tars  # noqa: F401  (they register themselves)
from tests.corpus.attack import ALL

__all__ = ["ALL"]
