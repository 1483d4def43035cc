"""Errors a user can cause or meet, each one clear line: what was found, what was expected, what to do.

    ColdstreamError
    ├── CheckpointError      a model directory that is missing, truncated, corrupt or of another kind
    │   ├── UnknownFamilyError   an architecture that no family describes
    │   ├── DenseModelError      a model without experts where only one with them is read
    │   └── NonFiniteError       a weight with NaN or Inf
    ├── SchemeError          a quantization scheme that does not fit a tensor
    ├── RecipeError          a recipe with an unknown key or a bad value
    ├── InputError           a text or another file given to work on: absent, unreadable, too short
    ├── OutputError          a destination that cannot be written (not empty, disk full, nothing to resume)
    ├── BudgetError          a plan that does not fit --vram or --ram
    ├── MachineError         a device, driver or system feature that is not there
    ├── ProfileError         routing statistics that are unreadable or belong to another model
    └── UsageError           a command line that cannot be right, whatever is on the disk (exit code 2)

The command line turns any of them into one line on stderr and an exit code; nothing else is caught there.
A name that nobody knows (a recipe, scheme, card or policy) and options that contradict each other are wrong
usage: 2. A path that leads nowhere, and anything about what lies there, is a failure: 1.
"""

# What a library raises over a file that it does not understand, whatever of it that is: caught where others' files are
# given to others' code, and nowhere else.
LIBRARY_ERRORS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, RuntimeError)


class ColdstreamError(Exception):
    """Base of every error that is the user's to act on. ``exit_code`` is what the command line returns."""

    exit_code = 1


class CheckpointError(ColdstreamError):
    """A model directory cannot be read as what it claims to be."""


class DenseModelError(CheckpointError):
    """A config.json of a family with experts describes a model without any."""


class UnknownFamilyError(CheckpointError):
    """No family describes this architecture."""


class NonFiniteError(CheckpointError):
    """A weight holds NaN or Inf, so nothing can be made of the checkpoint."""


class SchemeError(ColdstreamError):
    """A quantization scheme does not fit the tensor it is meant for."""


class RecipeError(ColdstreamError):
    """A recipe has an unknown key, a missing key or a value out of range."""


class InputError(ColdstreamError):
    """A file to work on is not there, cannot be read, or holds too little."""


class OutputError(ColdstreamError):
    """A destination cannot be written."""


class BudgetError(ColdstreamError):
    """What was asked for does not fit the memory budget."""


class MachineError(ColdstreamError):
    """This machine lacks something that the run needs."""


class ProfileError(ColdstreamError):
    """Routing statistics cannot be used with this model."""


class UsageError(ColdstreamError):
    """Arguments that contradict each other, or a name that is none."""

    exit_code = 2
