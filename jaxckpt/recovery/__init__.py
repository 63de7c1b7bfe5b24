"""Lost pipeline stages come back from their neighbours, from copies, or from a checkpoint."""

from jaxckpt.recovery.copies import NeighbourCopies as NeighbourCopies
from jaxckpt.recovery.copies import copy_ages as copy_ages
from jaxckpt.recovery.copies import init_copies as init_copies
from jaxckpt.recovery.copies import refresh_copies as refresh_copies
from jaxckpt.recovery.layout import Listed as Listed
from jaxckpt.recovery.layout import Stacked as Stacked
from jaxckpt.recovery.layout import StageLayout as StageLayout
from jaxckpt.recovery.layout import check_congruent as check_congruent
from jaxckpt.recovery.norms import StageNorms as StageNorms
from jaxckpt.recovery.norms import finite_stages as finite_stages
from jaxckpt.recovery.norms import init_norms as init_norms
from jaxckpt.recovery.norms import stage_norms as stage_norms
from jaxckpt.recovery.norms import update_norms as update_norms
from jaxckpt.recovery.optimizer import scale_by_reset_age as scale_by_reset_age
from jaxckpt.recovery.optimizer import scale_by_stage_lr as scale_by_stage_lr
from jaxckpt.recovery.optimizer import stage_optimizer as stage_optimizer
from jaxckpt.recovery.plan import Available as Available
from jaxckpt.recovery.plan import CostModel as CostModel
from jaxckpt.recovery.plan import RecoveryPlan as RecoveryPlan
from jaxckpt.recovery.plan import RecoveryPolicy as RecoveryPolicy
from jaxckpt.recovery.plan import plan_recovery as plan_recovery
from jaxckpt.recovery.read import read_stage as read_stage
from jaxckpt.recovery.record import RecoveryLog as RecoveryLog
from jaxckpt.recovery.record import ValidationGuard as ValidationGuard
from jaxckpt.recovery.recover import lower_recovery as lower_recovery
from jaxckpt.recovery.recover import recover_stage as recover_stage
