"""Two connected rooms for tests of LiveKit without a server; streams and calls cross."""

import asyncio
import types

from livekit import rtc


class Room(rtc.EventEmitter):
    """Interface of a room that the package uses; `meet` connects two."""

    def __init__(self, identity, kind):
        super().__init__()
        self.local_participant = LocalParticipant(self, identity, kind)
        self.remote_participants, self.other, self.stream_handlers = {}, None, {}

    def isconnected(self):
        return True

    def register_byte_stream_handler(self, topic, handler):
        self.stream_handlers[topic] = handler


class LocalParticipant:
    def __init__(self, room, identity, kind):
        self.room, self.identity, self.kind = room, identity, kind
        self.state = rtc.ParticipantState.PARTICIPANT_STATE_ACTIVE
        self.published, self.calls, self.attributes = [], [], {}
        self._rpc_handlers = {}

    def register_rpc_method(self, method, handler):
        self._rpc_handlers[method] = handler

    async def perform_rpc(self, *, destination_identity, method, payload):
        self.calls.append((method, payload))
        other = self.room.other.local_participant
        assert destination_identity == other.identity
        if method not in other._rpc_handlers:
            raise rtc.RpcError(rtc.RpcError.ErrorCode.UNSUPPORTED_METHOD, method)
        data = rtc.RpcInvocationData("1", self.identity, payload, 10.0, method)
        return other._rpc_handlers[method](data)

    async def publish_track(self, track, options):
        self.published.append(track.name)
        return types.SimpleNamespace(wait_for_subscription=lambda: asyncio.sleep(0))

    async def stream_bytes(self, *, name, topic, destination_identities, attributes):
        reader = Stream(attributes)
        self.room.other.stream_handlers[topic](reader, self.identity)
        return reader


class Stream:
    """Writer at one end, reader at the other."""

    def __init__(self, attributes):
        self.info = types.SimpleNamespace(attributes=attributes, stream_id="stream")
        self._parts = asyncio.Queue()

    async def write(self, data):
        self._parts.put_nowait(bytes(data))

    async def aclose(self):
        self._parts.put_nowait(None)

    def __aiter__(self):
        return self

    async def __anext__(self):
        if (part := await self._parts.get()) is None:
            raise StopAsyncIteration
        return part


def meet():
    """Room of the agent, and room of the avatar."""
    kind = rtc.ParticipantKind.PARTICIPANT_KIND_AGENT
    agent, avatar = Room("agent", kind), Room("avatar", kind)
    for one, two in ((agent, avatar), (avatar, agent)):
        one.other = two
        one.remote_participants[two.local_participant.identity] = two.local_participant
    return agent, avatar
