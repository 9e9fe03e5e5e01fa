"""The fake engine's CRIU: calls the real action-script for a stopped counter and does what its verdict says.

Run as `python -I -S _fake_runtime.py ACTION JOB PID CHECKOUT`, outlives whoever started it.
"""

import importlib.util
import os
import signal
import sys


def main() -> int:
    action_name, job, pid, checkout = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    os.environ["CRTOOLS_SCRIPT_ACTION"] = action_name
    os.environ["CRTOOLS_INIT_PID"] = str(pid)
    spec = importlib.util.spec_from_file_location("action", os.path.join(checkout, "ckpt", "criu", "action.py"))
    assert spec is not None and spec.loader is not None
    action = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(action)
    sys.argv = [sys.argv[0], job]
    verdict = action.main()
    kill = action_name == "post-dump" if verdict == 0 else action_name == "post-restore"
    try:
        os.kill(pid, signal.SIGKILL if kill else signal.SIGCONT)
    except ProcessLookupError:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
