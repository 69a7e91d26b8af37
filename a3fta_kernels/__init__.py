from . import ops
from .backends import BackendStatus, BackendUnavailableError, backends

__all__ = ["BackendStatus", "BackendUnavailableError", "backends", "ops"]
