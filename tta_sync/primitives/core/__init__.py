"""The primitives that workflows are composed of: function steps, sequence, parallel, choice, map."""

from tta_sync.primitives.core.base import (
    MISS as MISS,
)
from tta_sync.primitives.core.base import (
    CallerPrimitive as CallerPrimitive,
)
from tta_sync.primitives.core.base import (
    LambdaPrimitive as LambdaPrimitive,
)
from tta_sync.primitives.core.base import (
    ThreadPrimitive as ThreadPrimitive,
)
from tta_sync.primitives.core.base import (
    WorkflowPrimitive as WorkflowPrimitive,
)
from tta_sync.primitives.core.base import (
    caller_step as caller_step,
)
from tta_sync.primitives.core.base import (
    step as step,
)
from tta_sync.primitives.core.base import (
    thread_step as thread_step,
)
from tta_sync.primitives.core.composition import CompositionWarning as CompositionWarning
from tta_sync.primitives.core.conditional import ConditionalPrimitive as ConditionalPrimitive
from tta_sync.primitives.core.mapping import MapPrimitive as MapPrimitive
from tta_sync.primitives.core.parallel import ParallelPrimitive as ParallelPrimitive
from tta_sync.primitives.core.routing import RouterPrimitive as RouterPrimitive
from tta_sync.primitives.core.routing import SwitchPrimitive as SwitchPrimitive
from tta_sync.primitives.core.sequential import SequentialPrimitive as SequentialPrimitive
