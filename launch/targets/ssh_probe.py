"""Says what a machine would run: its Python, its JAX, and a fingerprint of the code of pgdist that it finds.

Its source is sent to every machine of a job before pgdist is known to be there, so it needs nothing but
Python, and an old one must understand it far enough to say how old it is.
"""

import hashlib
import importlib.util
import json
import os
import socket
import sys

MARK = "pgdist-probe "  # begins the line of the answer; the machine's login scripts may print as well


def describe(free_port=0):
    """What this machine would run; with `free_port`, whether a process could listen there now."""
    code = _fingerprint()
    facts = {"python": list(sys.version_info[:3]), "executable": sys.executable, "code": code}
    facts["jax"] = _version("jax") if sys.version_info >= (3, 8) else None
    if free_port:
        facts["port_is_free"] = _can_listen(free_port)
    return facts


def _fingerprint():
    """Of all modules and templates of pgdist; None where its agent is not found."""
    digest = hashlib.sha256()
    for package in ("launch", "pgdist"):
        found = importlib.util.find_spec(package)
        folders = list(found.submodule_search_locations or ()) if found else []
        if not folders or package == "launch" and not os.path.exists(os.path.join(folders[0], "agent.py")):
            return None
        for path in sorted(_sources(folders[0])):
            digest.update(os.path.relpath(path, folders[0]).encode() + b"\0")
            with open(path, "rb") as source:
                digest.update(hashlib.sha256(source.read()).digest())
    return digest.hexdigest()[:12]


def _sources(folder):
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith((".py", ".jinja")):
                yield os.path.join(place, name)


def _version(package):
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _can_listen(port):
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    print(MARK + json.dumps(describe(*map(int, sys.argv[1:]))), flush=True)
