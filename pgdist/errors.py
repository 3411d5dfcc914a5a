"""What can go wrong that is not a bug, each with the exit code that tells schedulers whether to restart.

Raise these where the cause is known, with the value, the file, the line or the field in the message, and
what to do about it. The commands print the message without a traceback and leave with `exit_code`; anything
else is a bug (1).
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake that its user can mend; the message says where it is, what was expected and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A bad command line or config: exit code 2."""


class DataError(UserError):
    """Bad training or evaluation data: exit code 3."""

    exit_code = 3


class WeightsError(UserError):
    """A weights file or checkpoint that cannot be used: exit code 3."""

    exit_code = 3


class DivergedError(UserError):
    """The loss was not finite for longer than the configured patience: exit code 4."""

    exit_code = 4


class Preempted(UserError):
    """The job was asked to stop and its state is saved: exit code 42, restart it."""

    exit_code = 42


class PeerLostError(UserError):
    """A peer process was lost or a step hung: exit code 43, restart it."""

    exit_code = 43
