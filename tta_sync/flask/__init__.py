"""Flask: schema → workflow → schema in a view, one context per request, and errors as RFC 9457 problem details.

In a blueprint that is dropped into somebody's application::

    bp = Blueprint("summaries", __name__)
    tta = TTASync(bp)


    @bp.post("/api/summaries")
    @tta.workflow(flow, load=SummaryRequest, dump=SummaryResponse)
    def summarise(result):
        return result

``app.register_blueprint(bp)`` is all that the application does. ``TTASync(app)``, or ``init_app``, is for an
application of one's own. Nothing is kept outside ``app.extensions["tta_sync"]``, ``app.config`` and the request.

Settings, in ``app.config``:

=================  ==========  =========================================================================================
TTA_DEADLINE       15.0        seconds that a request may take, from its arrival; None: no deadline
TTA_MAX_BODY       16 MiB      bytes of a body that is loaded, where MAX_CONTENT_LENGTH does not say
TTA_MAX_DEPTH      100         nesting of a JSON body
TTA_REDIS_URL      REDIS_URL   where ``rate_limit`` and ``idempotent`` keep what processes share; looked for here, then
                               in the environment; "": nowhere
=================  ==========  =========================================================================================
"""

from tta_sync.flask.extension import TTASync
from tta_sync.flask.problems import Problem
from tta_sync.flask.storage import remote_address

__all__ = ["Problem", "TTASync", "remote_address"]
