"""`python -m zramd.cli`, where the command `zramd` is not installed."""

from zramd.cli import main

main()
