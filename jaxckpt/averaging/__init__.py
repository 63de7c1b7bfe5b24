"""Better models from checkpoints: weighted averages, soups, EMA; streamed, sharded, rounded once."""

from jaxckpt.averaging import batch_norm as batch_norm
from jaxckpt.averaging import ema as ema
from jaxckpt.averaging import posthoc as posthoc
from jaxckpt.averaging import swa as swa
from jaxckpt.averaging.average import average as average
from jaxckpt.averaging.average import average_to as average_to
from jaxckpt.averaging.combine import Barrier as Barrier
from jaxckpt.averaging.combine import barrier as barrier
from jaxckpt.averaging.combine import combine as combine
from jaxckpt.averaging.combine import interpolate as interpolate
from jaxckpt.averaging.combine import stack as stack
from jaxckpt.averaging.ema import ema_weights as ema_weights
from jaxckpt.averaging.lawa import lawa as lawa
from jaxckpt.averaging.learned import LearnedSoup as LearnedSoup
from jaxckpt.averaging.learned import learned_soup as learned_soup
from jaxckpt.averaging.posthoc import Snapshot as Snapshot
from jaxckpt.averaging.posthoc import post_hoc_ema as post_hoc_ema
from jaxckpt.averaging.posthoc import power_weights as power_weights
from jaxckpt.averaging.runs import run_average as run_average
from jaxckpt.averaging.soups import GreedySoup as GreedySoup
from jaxckpt.averaging.soups import greedy_soup as greedy_soup
from jaxckpt.averaging.soups import score_weights as score_weights
from jaxckpt.averaging.soups import uniform_soup as uniform_soup
from jaxckpt.averaging.soups import weighted_soup as weighted_soup
from jaxckpt.averaging.wiseft import wise_ft as wise_ft
