"""Functions of tensors recorded once and replayed without Python between the calls."""

from pyro_em.tape.calls import Deviation
from pyro_em.tape.program import Entries
from pyro_em.tape.record import NotRecorded
from pyro_em.tape.replay import Tape

__all__ = ["Deviation", "Entries", "NotRecorded", "Tape"]
