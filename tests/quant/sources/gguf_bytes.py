"""A GGUF file taken apart into what can be changed one by one, and put together again, whatever it says then."""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32, I32, F32, BOOL, TEXT, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


@dataclass
class Info:
    """A tensor's header: ``dims`` with the in features first, as they are stored."""

    name: str
    dims: list[int]
    kind: int
    offset: int


@dataclass
class GgufBytes:
    """``values`` are (type, value) by name; an array is (type of its items, items). ``twice`` are written again."""

    values: dict[str, tuple[int, Any]]
    infos: list[Info]
    body: bytes
    version: int = 3
    counts: tuple[int, int] | None = None  # of tensors and values, where they are not to be true
    twice: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "GgufBytes":
        """What a well-formed file is made of."""
        data, place = path.read_bytes(), 4

        def number(form: str) -> Any:
            nonlocal place
            (found,) = struct.unpack_from("<" + form, data, place)
            place += struct.calcsize("<" + form)
            return found

        def text() -> str:
            nonlocal place
            size = number("Q")
            place += size
            return data[place - size : place].decode()

        def value(kind: int) -> Any:
            if kind == ARRAY:
                inner, count = number("I"), number("Q")
                return inner, [value(inner) for _ in range(count)]
            return text() if kind == TEXT else number(_NUMBERS[kind])

        version, tensors, entries = number("I"), number("Q"), number("Q")
        values = {}
        for _ in range(entries):
            name, kind = text(), number("I")
            values[name] = (kind, value(kind))
        infos = [
            Info(text(), [number("Q") for _ in range(number("I"))], number("I"), number("Q")) for _ in range(tensors)
        ]
        return cls(values, infos, data[-(-place // 32) * 32 :], version)

    def write(self, path: Path) -> Path:
        """Write it to ``path``, aligned to 32 bytes."""

        def text(said: str) -> bytes:
            encoded = said.encode("utf-8", "surrogateescape")
            return struct.pack("<Q", len(encoded)) + encoded

        def value(kind: int, it: Any) -> bytes:
            if kind == ARRAY:
                inner, items = it
                return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, item) for item in items)
            return text(it) if kind == TEXT else struct.pack("<" + _NUMBERS[kind], it)

        tensors, entries = self.counts or (len(self.infos), len(self.values) + len(self.twice))
        made = b"GGUF" + struct.pack("<IQQ", self.version, tensors, entries)
        for name in [*self.values, *self.twice]:
            kind, it = self.values[name]
            made += text(name) + struct.pack("<I", kind) + value(kind, it)
        for info in self.infos:
            made += text(info.name) + struct.pack("<I", len(info.dims))
            made += b"".join(struct.pack("<Q", size) for size in info.dims) + struct.pack("<IQ", info.kind, info.offset)
        path.write_bytes(made + bytes(-len(made) % 32) + self.body)
        return path
