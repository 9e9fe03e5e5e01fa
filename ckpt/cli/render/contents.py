"""`ckpt inspect` for people: what a checkpoint is, its processes as a tree, what they have open, where a text is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ckpt.cli.render import units
from ckpt.cli.render.rows import Row
from ckpt.cli.render.tables import columns

PARTS = ("files", "sockets", "mounts", "members", "environment")
_KINDS = {"private": "anonymous", "heap": "heap", "stack": "stack", "file_private": "files, private", "file_shared": "files, shared",
          "shared": "shared", "other": "other"}  # fmt: skip


def inspect_lines(row: Row, parts: Sequence[str] = ()) -> Iterator[str]:
    """What a checkpoint is and what its restore needs, its process tree, and the parts that were asked for."""
    yield units.clean(row["ref"])
    for label, text in _facts(row):
        if text:
            yield f"  {label:<16} {units.clean(text)}"
    yield ""
    yield from _tree(row, "environment" in parts)
    for part in parts:
        if part in ("files", "sockets"):
            yield from _opened(row, part)
    if "mounts" in parts:
        rows = [(m["mountpoint"], m["fstype"], m["source"], m["external"]) for m in row["mounts"]]
        yield from _section("mounts", ("MOUNTPOINT", "TYPE", "SOURCE", "EXTERNAL"), rows)
    if "members" in parts:
        yield from _section("members", ("MEMBER", "SIZE"), [(name, units.size(size)) for name, size in row["sizes"].items()])


def found_lines(row: Row) -> Iterator[str]:
    """A match: where it is, and the bytes around it as a hex dump."""
    yield f"{row['pid']} {units.clean(row['comm'])} {row['kind'] or 'memory'} 0x{row['address']:x} ({units.plural(row['length'], 'byte')})"
    context = bytes.fromhex(row["context"])
    address = row["context_address"]
    first = address - address % 16
    for at in range(first, address + len(context), 16):
        cells = [context[n - address] if 0 <= n - address < len(context) else None for n in range(at, at + 16)]
        numbers = " ".join("  " if cell is None else f"{cell:02x}" for cell in cells)
        text = "".join(" " if cell is None else chr(cell) if 32 <= cell < 127 else "." for cell in cells)
        yield f"  {at:012x}  {numbers}  |{text}|"


def _facts(row: Row) -> list[tuple[str, str]]:
    host, stats, archive = row["host"], row["stats"], row["archive"]
    yes = [label for key, label in (("tcp_established", "TCP connections"), ("file_locks", "file locks"), ("shell_job", "a terminal")) if row[key]]
    image = row["container_image"] or {}
    sizes = row["sizes"]
    pages = sum(size for name, size in sizes.items() if name.startswith("checkpoint/pages-"))
    parts = [("memory pages", pages), ("root file system", sizes.get("rootfs-diff.tar", 0)),
             ("volumes", sum(size for name, size in sizes.items() if name.startswith("volumes/")))]  # fmt: skip
    timings = [(label, stats[key]) for key, label in (("frozen_time_us", "frozen"), ("memdump_time_us", "memory"), ("memwrite_time_us", "written"))]
    memory = row["memory"]
    return [
        ("id", row["id"]),
        ("engine", " ".join(filter(None, (row["engine"], row["engine_version"])))),
        ("runtime", row["runtime"] or ""),
        ("container", row["container_id"]),
        ("container image", " ".join(filter(None, (image.get("name"), str(image.get("id", ""))[:19], str(image.get("digest", "")))))),
        ("created", units.when(row["created_s"])),
        ("host", ", ".join(filter(None, (
            host["hostname"], host["arch"], _with("Linux", host["kernel"]), _with("CRIU", host["criu_version"]), _with("ckpt", host["ckpt_version"]),
        )))),
        ("restore needs", ", ".join(yes)),
        ("frozen", units.duration(row["freeze_s"]) if row["freeze_s"] else ""),
        ("CRIU's times", ", ".join(f"{label} {units.duration(us / 1e6)}" for label, us in timings if us)),
        ("left running", "yes" if row["left_running"] else ""),
        ("written by", row["foreign"]),
        ("networks", ", ".join(row["networks"])),
        ("addresses", ", ".join(row["addresses"])),
        ("ports", ", ".join(f"{p['host_port']}->{p['container_port']}/{p['protocol']}" for p in row["ports"])),
        ("volumes", ", ".join(f"{name} at {destination}" for name, destination in row["volumes"])),
        ("host mounts", ", ".join(f"{m['source']} at {m['destination']}" for m in row["host_mounts"])),
        ("size", units.size(row["size_bytes"]) + _list([f"{label} {units.size(size)}" for label, size in parts if size])),
        ("archive", _archive(archive)),
        ("signature", "there, not verified (ckpt verify)" if row["signed"] else ""),
        ("open", ", ".join(f"{count} {kind}" for kind, count in row["open_kinds"].items())),
        ("memory", ", ".join(f"{_KINDS.get(kind, kind)} {units.size(size)}" for kind, size in memory.get("mapped_by_kind_bytes", {}).items())),
        ("not readable", row["unread"]),
    ]  # fmt: skip


def _archive(archive: Row) -> str:
    if not archive["bytes"]:
        return ""
    words = [units.size(archive["bytes"]), archive["compression"], *(word for word in ("indexed", "encrypted") if archive[word])]
    return ", ".join(words)


def _tree(row: Row, environment: bool) -> Iterator[str]:
    if not row["tasks"]:
        if row["processes"]:
            yield "  processes"
        for process in row["processes"]:
            threads = f"  {process['threads']} threads" if process["threads"] > 1 else ""
            yield f"    {process['pid']:>7}  {units.clean(process['comm'])}{threads}"
        return
    rows: list[tuple[str, ...]] = []
    notes: list[list[str]] = []
    for task, depth in _ordered(row["tasks"]):
        memory = task["memory"]
        rows.append((
            str(task["pid"]), "  " * depth + task["comm"], str(task["threads"]), task["state"], "" if task["uid"] is None else str(task["uid"]),
            *(units.size(memory[key]) if memory[key] else "" for key in ("image_bytes", "shared_image_bytes", "zero_bytes")),
            units.size(memory["mapped_bytes"]) if memory["mapped_bytes"] else "", task["exe"],
        ))  # fmt: skip
        notes.append([*[" ".join(task.get("argv", ()))], *task.get("environment", ())] if environment and task.get("argv") is not None else [])
    head = ("PID", "COMMAND", "THREADS", "STATE", "UID", "IN IMAGE", "SHARED", "ZERO", "MAPPED", "EXECUTABLE")
    lines = columns(head, rows)
    yield "  " + next(lines)
    for line, more in zip(lines, notes, strict=True):
        yield "  " + line
        for text in more:
            yield f"            {units.clean(text)}"


def _ordered(tasks: Sequence[Row]) -> Iterator[tuple[Row, int]]:
    """Children behind their parents, with their depth. The tree is data: it may be anything."""
    children: dict[int, list[Row]] = {}
    known = {task["pid"] for task in tasks}
    for task in tasks:
        children.setdefault(task["ppid"] if task["ppid"] in known and task["ppid"] != task["pid"] else 0, []).append(task)
    seen: set[int] = set()
    stack = [(task, 0) for task in reversed(children.get(0, []))]
    while stack:
        task, depth = stack.pop()
        if task["pid"] in seen:
            continue
        seen.add(task["pid"])
        yield task, min(depth, 20)
        stack += [(child, depth + 1) for child in reversed(children.get(task["pid"], []))]
    yield from ((task, 0) for task in tasks if task["pid"] not in seen)


def _opened(row: Row, part: str) -> Iterator[str]:
    rows: list[tuple[str, ...]] = []
    for task in row["tasks"]:
        for item in task[part]:
            who = (str(task["pid"]), task["comm"], str(item["fd"]))
            rest = (item["kind"], item["path"]) if part == "files" else (item["protocol"], item["state"], item["local"], item["remote"])
            rows.append((*who, *rest))
    head = ("PID", "COMMAND", "FD", *(("KIND", "PATH") if part == "files" else ("PROTOCOL", "STATE", "LOCAL", "REMOTE")))
    yield from _section(part if part == "sockets" else "open files", head, rows)


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield ""
    yield f"  {title}" + ("" if rows else ": none")
    if rows:
        for line in columns(head, rows):
            yield f"    {line}"


def _with(label: str, text: str) -> str:
    return f"{label} {text}" if text else ""


def _list(parts: Sequence[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""
