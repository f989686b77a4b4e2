from .instrument import Instrument as Instrument
from .instrument import Number as Number
from .instrument import Reading as Reading
from .registry import INSTRUMENTS as INSTRUMENTS
from .result import Portrait as Portrait
from .sitting import portrait as portrait
from .subject import Subject as Subject
from .subject import prepare as prepare

__all__ = ["INSTRUMENTS", "Instrument", "Number", "Portrait", "Reading", "Subject", "portrait", "prepare"]
