"""Typed errors of the data plane and the actors.

Every refusal carries a short stable ``code`` besides its text, so that a caller on the other side
of Ray or HTTP can tell errors apart without parsing words. Not for argument checks inside pure
functions: those raise ``ValueError``.
"""


class AffluxError(RuntimeError):
    """Base of all errors that afflux raises on purpose.

    Args:
        message: what was given, what was expected and what to do.
        code: short stable identifier, e.g. ``peer_timeout``.
    """

    code = "afflux_error"

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code

    def __reduce__(self):
        return (type(self), (self.message, self.code))


class CheckpointError(AffluxError):
    """A checkpoint that is missing, truncated, or not a mixture of experts."""

    code = "bad_checkpoint"


class FrameError(AffluxError):
    """A frame that can't be read: wrong magic, version, length or dtype."""

    code = "bad_frame"


class PeerMismatch(AffluxError):
    """Two processes met that don't serve the same model in the same way."""

    code = "peer_mismatch"


class PeerLost(AffluxError):
    """The transport says that a peer is gone."""

    code = "peer_lost"


class PeerTimeout(AffluxError):
    """A peer did not answer a frame within its deadline."""

    code = "peer_timeout"


class PeerRefused(AffluxError):
    """A peer answered a frame with an error."""

    code = "peer_refused"


class StepInterrupted(AffluxError):
    """A step can't be finished under its expert table; a newer one may help."""

    code = "no_holder"


class UnsupportedModel(AffluxError):
    """The model has no routed experts that can be served remotely."""

    code = "unsupported_model"
