"""Run async workflows from synchronous code, on one managed event loop per process."""

from tta_sync.context import WorkflowContext as WorkflowContext
from tta_sync.context import current_context as current_context
from tta_sync.facade import SyncFacade as SyncFacade
from tta_sync.facade import async_to_sync as async_to_sync
from tta_sync.facade import call_sync as call_sync
from tta_sync.facade import iterate_sync as iterate_sync
from tta_sync.facade import resource as resource
from tta_sync.facade import run_on_caller as run_on_caller
from tta_sync.facade import run_sync as run_sync
from tta_sync.primitives.core.base import caller_step as caller_step
from tta_sync.primitives.core.base import step as step
from tta_sync.primitives.core.base import thread_step as thread_step
