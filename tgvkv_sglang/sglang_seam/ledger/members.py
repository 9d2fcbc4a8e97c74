"""Names of SGLang's classes that we read, assign or override, besides the functions in :mod:`.hooks`."""

from __future__ import annotations

from .of_model import OF_MODEL
from .of_scheduler import OF_SCHEDULER
from .rows import Members

MEMBERS: tuple[Members, ...] = (*OF_SCHEDULER, *OF_MODEL)
