"""`zramd`, but that it never tires of workers that die, and waits as long as LOAD_S, LEAVE_S and
READY_S say for those that come and go in an upgrade, and HANDSHAKE_S for a client to say what it
wants: python -m tests.unlimited VERB ..."""

import os

from zramd.cli import main
from zramd.nbd import connection
from zramd.service import candidate, supervisor

supervisor.MOST_DEATHS = 1 << 20
supervisor.PAUSES_S = (0.0,)
candidate.LOAD_S = float(os.environ.get("LOAD_S", candidate.LOAD_S))
candidate.READY_S = float(os.environ.get("READY_S", candidate.READY_S))
candidate.LEAVE_S = float(os.environ.get("LEAVE_S", candidate.LEAVE_S))
connection._HANDSHAKE_SECONDS = float(os.environ.get("HANDSHAKE_S", connection._HANDSHAKE_SECONDS))

if __name__ == "__main__":
    main()
