"""`zramd`, but that it never tires of workers that die: python -m tests.unlimited VERB ..."""

from zramd.cli import main
from zramd.service import supervisor

supervisor.MOST_DEATHS = 1 << 20
supervisor.PAUSES_S = (0.0,)

if __name__ == "__main__":
    main()
