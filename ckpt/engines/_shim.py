"""The OCI-runtime shim: stands in for runc or crun during one call of an engine, so that a dump or restore can be held.

Run as a program of its own (`python -I -S _shim.py REAL-RUNTIME ARGS...`) by podman or conmon, mapped over the runtime's name
through CONTAINERS_CONF_OVERRIDE, so it imports nothing but the standard library. Without a job (`CKPT_SHIM_JOB`) and for every
subcommand but `checkpoint` and `restore` it simply becomes the real runtime: conmon keeps our environment for the container's
whole life, and what podman starts from there comes through here long after ckpt is gone.

`checkpoint`: the real runtime runs in the background without --leave-running, with CRIU's action-script holding it; the
shim returns 0 as soon as the dump is held (podman then goes on to its export), or the runtime's own failure.
`restore`: tells the owner where the mounted root is, waits until it is filled, then becomes the real runtime. The plan may say that
the container is to start anew instead: the engine has made everything for it, and CRIU has no part in it.
"""

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# It imports nothing that it can do without, and the plan is no JSON: `json` alone takes as long as Python's start, while a workload stands still.

POLL_S = 0.005
PLAN = "shim.plan"


def plan_dumps(plan: "Mapping[str, str]") -> bytes:
    """The plan as a file's content: names and values, each ended by a zero byte."""
    return b"".join(os.fsencode(word) + b"\0" for item in plan.items() for word in item)


def plan_loads(data: bytes) -> "dict[str, str]":
    """What `plan_dumps` wrote; what comes after the last zero byte is not looked at."""
    words = [os.fsdecode(word) for word in data.split(b"\0")[:-1]]
    return dict(zip(words[::2], words[1::2], strict=False))


def become(real: str, args: list[str]) -> None:
    os.execv(real, [real, *args])


def subcommand(args: list[str]) -> int:
    """Index of the subcommand, or -1 (global options of runc and crun come before it)."""
    for index, word in enumerate(args):
        if word in ("checkpoint", "restore"):
            return index
        if word in (
            "create",
            "start",
            "run",
            "exec",
            "kill",
            "delete",
            "state",
            "list",
            "ps",
            "pause",
            "resume",
            "update",
            "features",
            "events",
            "spec",
        ):
            return -1
    return -1


def replaced(args: list[str], option: str, value: str) -> list[str]:
    """`args` with the value of a long option changed (`--opt V` and `--opt=V`), or added at the front."""
    out: list[str] = []
    index, found = 0, False
    while index < len(args):
        if args[index] == option and index + 1 < len(args):
            out += [option, value]
            index += 2
            found = True
        elif args[index].startswith(option + "="):
            out.append(option + "=" + value)
            index += 1
            found = True
        else:
            out.append(args[index])
            index += 1
    return out if found else [option, value, *out]


def option_value(args: list[str], option: str) -> str:
    for index, word in enumerate(args):
        if word == option and index + 1 < len(args):
            return args[index + 1]
        if word.startswith(option + "="):
            return word.split("=", 1)[1]
    return ""


def flags_of(plan: "dict[str, str]", real: str) -> "list[str]":
    """What this runtime is told besides."""
    return plan.get(f"flags {os.path.basename(real)}", "").split()


def note(job: str, name: str, content: bytes) -> None:
    """Write a marker file so that it is whole or not there, into the block that was laid aside for it: a full disk must not hide it."""
    path = os.path.join(job, name)
    fd = os.open(path + ".part", os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(fd, content)
    os.close(fd)
    os.rename(path + ".part", path)


def checkpoint(real: str, head: list[str], rest: list[str], job: str, plan: "dict[str, str]") -> int:
    rest = [word for word in rest if word != "--leave-running"]
    rest = replaced(replaced(rest, "--image-path", plan["images"]), "--work-path", plan["work"])
    rest = [*flags_of(plan, real), *rest]
    os.makedirs(plan["images"], mode=0o700, exist_ok=True)
    log_path = os.path.join(job, "runtime.log")
    supervisor = os.fork()
    if supervisor == 0:
        # The supervisor: outlives podman's call, keeps none of its pipes, notes how the real runtime ended.
        os.setsid()
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.closerange(3, 1024)
        child = os.fork()
        if child == 0:
            os.execv(real, [real, *head, *rest])
        _, status = os.waitpid(child, 0)
        try:
            note(job, "runtime.exit", str(os.waitstatus_to_exitcode(status)).encode())
        finally:
            os._exit(0)
    while True:
        if os.path.exists(os.path.join(job, "held")):
            return 0
        try:
            with open(os.path.join(job, "runtime.exit")) as source:
                code = int(source.read() or "1")
        except OSError:
            if not os.path.isdir(job):
                return 1
            if supervisor and os.waitpid(supervisor, os.WNOHANG)[0]:
                supervisor = 0  # one more look: its last act was to write the marker
            elif not supervisor:
                sys.stderr.write("ckpt: the runtime ended and left no word\n")
                return 1
            else:
                time.sleep(POLL_S)
            continue
        with open(log_path, errors="replace") as source:
            sys.stderr.write(source.read()[-4000:])
        return code or 1


def restore(real: str, head: list[str], rest: list[str], job: str, plan: "dict[str, str]") -> int:
    bundle = option_value(rest, "--bundle") or option_value(rest, "-b") or os.getcwd()
    note(job, "bundle", plan_dumps({"bundle": bundle, "pid": str(os.getpid()), "id": rest[-1] if rest else ""}))
    while not os.path.exists(os.path.join(job, "prepared")):
        if os.path.exists(os.path.join(job, "abort")) or not os.path.isdir(job):
            sys.stderr.write("ckpt: the restore was given up\n")
            return 1
        time.sleep(POLL_S)
    if plan.get("cold"):
        options = [word for name in ("--pid-file", "--console-socket") if (value := option_value(rest, name)) for word in (name, value)]
        become(real, [*head[:-1], "run", "--detach", "--bundle", bundle, *options, rest[-1]])
    rest = replaced(replaced(rest, "--image-path", plan["images"]), "--work-path", plan["work"])
    become(real, [*head, *flags_of(plan, real), *rest])
    return 127


def main() -> int:
    real, args = sys.argv[1], sys.argv[2:]
    job = os.environ.get("CKPT_SHIM_JOB", "")
    at = subcommand(args)
    if at < 0 or "--help" in args or "-h" in args or not job or not os.path.isdir(job):
        become(real, args)
    try:
        with open(os.path.join(job, PLAN), "rb") as source:
            plan = plan_loads(source.read())
    except OSError:
        become(real, args)
    verb = args[at]
    # Without a container it is a question: podman asks for `restore --lsm-mount-context`, before it restores into a pod.
    if plan.get("verb") != verb or args[-1].startswith("-") or at == len(args) - 1:
        become(real, args)
    if plan.get("sketch"):
        return 0  # only what the engine itself writes down is wanted
    os.environ["CRIU_CONFIG_FILE"] = plan["criu_config"]
    head, rest = args[: at + 1], args[at + 1 :]
    return checkpoint(real, head, rest, job, plan) if verb == "checkpoint" else restore(real, head, rest, job, plan)


if __name__ == "__main__":
    sys.exit(main())
