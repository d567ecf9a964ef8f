"""`python -m sseapp` where the wheel is installed; see hatch_build.py beside it."""

from ssecore.server.command import main

raise SystemExit(main())
