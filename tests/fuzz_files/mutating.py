"""Files changed at random: bits, lengths, entries of zips with their checksums mended, values in
JSON, pickles that leave a trace when they are run."""

from __future__ import annotations

import io
import json
import pickle
import stat
import zipfile
from pathlib import Path

from bridge import archive

NUMBERS = (0, -1, 1, 2**31 - 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"))
TEXTS = (
    "",
    "a" * 5000,
    "../../etc/passwd",
    "\0",
    "__import__('os').abort()",
    "10**10**10",
    "\ud800",
)
VALUES = (*NUMBERS, *TEXTS, None, True, [], {}, [[[[]]]], {"": {}})


class Canary:
    """What a pickle becomes that was unpickled: a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path(self.path).touch, ())


def flipped(data, random):
    """Some bits changed."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        found[random.randrange(len(found))] ^= 1 << random.randrange(8)
    return bytes(found)


def cut(data, random):
    return data[: random.randrange(len(data))]


def shifted(data, random):
    """A part taken out, doubled, or put in anew at random."""
    a, b = sorted(random.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + random.choice((1, 4, 64, 4096)))
    middle = random.choice((b"", 2 * data[a:b], random.randbytes(b - a)))
    return data[:a] + middle + data[b:]


def counted(data, random):
    """Four or eight bytes, as lengths and offsets have, changed to a number that is odd there."""
    size = random.choice((2, 4, 8))
    if len(data) < size:
        return data + b"\xff" * size
    at = random.randrange(len(data) - size + 1)
    number = random.choice((0, 1, 0x7F, 0xFF, 2 ** (8 * size - 1), 2 ** (8 * size) - 1, len(data)))
    return data[:at] + number.to_bytes(size, "little") + data[at + size :]


def spliced(data, random):
    """The beginning of it with an end of it."""
    return data[: random.randrange(len(data))] + data[random.randrange(len(data)) :]


BYTES = (flipped, flipped, cut, shifted, counted, spliced)


def changed(data, random):
    """Bytes changed in one of these ways."""
    return random.choice(BYTES)(data, random) if data else random.randbytes(9)


def in_json(data, random):
    """A value or a key of a JSON text changed; its bytes where it is none."""
    try:
        tree = json.loads(data)
    except ValueError:
        return changed(data, random)
    places = list(_places(tree))
    if not places or random.random() < 0.02:
        depth = 100_000
        return b"[" * depth + b"]" * depth
    at, key = random.choice(places)
    what = random.random()
    if what < 0.15:
        del at[key]
    elif what < 0.3 and isinstance(at, dict):
        at[random.choice(TEXTS)] = at.pop(key)
    elif what < 0.4 and isinstance(at, list):
        at.insert(key, at[key])
    elif what < 0.6:
        other, its = random.choice(places)
        at[key] = other[its]
    else:
        at[key] = random.choice(VALUES)
    try:
        return json.dumps(tree).encode(errors="surrogatepass")
    except (ValueError, RecursionError):  # in a circle
        return changed(data, random)


def _places(tree):
    """(container, key) of everything in a tree of JSON."""
    pairs = list(tree.items()) if isinstance(tree, dict) else []
    pairs = list(enumerate(tree)) if isinstance(tree, list) else pairs
    for key, value in pairs:
        yield tree, key
        yield from _places(value)


def in_entry(data, random, canary, only=""):
    """A zip with one entry changed, its checksum mended."""
    found = _entries(data)
    name = random.choice([n for n in found if only in n])
    old = found[name]
    if random.random() < 0.1:
        found[name] = pickle.dumps(Canary(canary), protocol=random.choice((0, 2, 4)))
    elif name.endswith(".pt2") and random.random() < 0.8:
        found[name] = in_entry(old, random, canary)
    elif name.endswith(".json"):
        found[name] = random.choice((in_json, in_json, changed))(old, random)
    else:
        found[name] = changed(old, random)
    return archive.zipped(found)


def in_zip(data, random, canary):
    """A zip with entries missing, more, twice, renamed, swapped, linked, packed or far too large."""
    found = list(_entries(data).items())
    k = random.randrange(len(found))
    name, old = found[k]
    kind = stat.S_IFREG
    packed = random.random() < 0.3
    match random.randrange(7):
        case 0:
            del found[k]
        case 1:
            found.append(
                (random.choice((name, "evil.pkl", "../evil")), pickle.dumps(Canary(canary)))
            )
        case 2:
            found[k] = (random.choice(TEXTS[1:4]) or name, old)
        case 3:
            other = random.randrange(len(found))
            found[k], found[other] = (name, found[other][1]), (found[other][0], old)
        case 4:
            kind = random.choice((stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO))
        case 5:
            found[k], packed = (name, bytes(random.choice((10**5, 3 * 10**7)))), True
        case 6:
            found[k] = (name, b"")
    out = io.BytesIO()
    method = (
        zipfile.ZIP_DEFLATED if packed else random.choice((zipfile.ZIP_STORED, zipfile.ZIP_BZIP2))
    )
    with zipfile.ZipFile(out, "w", method) as z:
        for i, (name, entry) in enumerate(found):
            info = zipfile.ZipInfo(name.replace("\0", "0"))
            info.compress_type = method
            info.external_attr = ((kind if i == k else stat.S_IFREG) | 0o600) << 16
            z.writestr(info, entry)
    whole = out.getvalue()
    return changed(whole, random) if random.random() < 0.2 else whole


def _entries(data):
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        return {n: z.read(n) for n in z.namelist()}
