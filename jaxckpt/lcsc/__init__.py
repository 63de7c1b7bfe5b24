"""LCSC: search for the coefficients with which saved checkpoints make the best model."""

from jaxckpt.lcsc import metrics as metrics
from jaxckpt.lcsc.merge import Lora as Lora
from jaxckpt.lcsc.progress import Advance as Advance
from jaxckpt.lcsc.report import Report as Report
from jaxckpt.lcsc.report import Result as Result
from jaxckpt.lcsc.search import search as search
from jaxckpt.lcsc.space import Space as Space
from jaxckpt.lcsc.space import profiles as profiles
from jaxckpt.lcsc.strategies import names as names
