"""The part of the Open Inference Protocol's gRPC service that an engine calls, as a .proto for any compiler.

It is drawn from the descriptors inside `tritonclient`, so its names and numbers are those of the server; what only
changes a server (loading, shared memory, tracing) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tickserve.errors import MissingExtraError

METHODS = ("ServerLive", "ServerReady", "ModelReady", "ModelMetadata", "ModelInfer")
HEADER = """\
// The Open Inference Protocol over gRPC, as Triton serves it: what an engine calls.
// Written by `python -m export.wire_example` from the descriptors of tritonclient; docs/wire.md says how to use it.
syntax = "proto3";

package inference;
"""


def proto_text() -> str:
    """The .proto file. Raises MissingExtraError without tritonclient."""
    file = _file()
    (service,) = file.service
    methods = [method for method in service.method if method.name in METHODS]
    messages = {message.name: message for message in file.message_type}
    roots = [kind for method in methods for kind in (method.input_type, method.output_type)]
    blocks = [HEADER, f"service {service.name} {{"]
    blocks += [f"  rpc {m.name}({_short(m.input_type)}) returns ({_short(m.output_type)}) {{}}" for m in methods]
    blocks.append("}")
    for name in _reached(messages, roots):
        blocks += ["", *_message(messages[name], "")]
    return "\n".join(blocks) + "\n"


def _file() -> Any:
    try:
        from google.protobuf import descriptor_pb2  # type: ignore[import-untyped]
        from tritonclient.grpc import service_pb2
    except ImportError as error:
        raise MissingExtraError.of("tritonclient", "export") from error
    file = descriptor_pb2.FileDescriptorProto()
    service_pb2.DESCRIPTOR.CopyToProto(file)
    return file


def _short(type_name: str) -> str:
    return type_name.removeprefix(".inference.")


def _reached(messages: dict[str, Any], roots: list[str]) -> list[str]:
    """The top-level messages that `roots` are made of, in the order of the file."""
    found: set[str] = set()
    waiting = [_short(root).partition(".")[0] for root in roots]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [_short(kind).partition(".")[0] for kind in _kinds(messages[name])]
    return [name for name in messages if name in found]


def _kinds(message: Any) -> Iterator[str]:
    yield from (field.type_name for field in message.field if field.type_name)
    for nested in message.nested_type:
        yield from _kinds(nested)


def _message(message: Any, indent: str) -> Iterator[str]:
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    yield f"{indent}message {message.name} {{"
    inner = indent + "  "
    for nested in message.nested_type:
        if nested.name not in maps:
            yield from _message(nested, inner)
    for field in message.field:
        if not field.HasField("oneof_index"):
            yield f"{inner}{_field(field, maps)}"
    for index, oneof in enumerate(message.oneof_decl):
        yield f"{inner}oneof {oneof.name} {{"
        for field in message.field:
            if field.HasField("oneof_index") and field.oneof_index == index:
                yield f"{inner}  {_field(field, maps)}"
        yield f"{inner}}}"
    yield f"{indent}}}"


def _field(field: Any, maps: dict[str, Any]) -> str:
    entry = maps.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = entry.field
        return f"map<{_kind(key)}, {_kind(value)}> {field.name} = {field.number};"
    repeated = "repeated " if field.label == field.LABEL_REPEATED else ""
    return f"{repeated}{_kind(field)} {field.name} = {field.number};"


def _kind(field: Any) -> str:
    if field.type_name:
        return _short(field.type_name)
    name: str = field.Type.Name(field.type)
    return name.removeprefix("TYPE_").lower()
