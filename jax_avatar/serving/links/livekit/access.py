"""Access token of the avatar for a LiveKit room."""

import datetime

from livekit import api

__all__ = ["avatar_token"]

_ON_BEHALF = "lk.publish_on_behalf"  # attribute: the agent whose avatar this is


def avatar_token(
    key: str, secret: str, room: str, identity: str, *, agent: str | None = None, hours: float = 6
) -> str:
    """Access token to join a room and publish in it.

    Args:
        key: API key of the LiveKit project.
        secret: API secret of that key.
        room: to join.
        identity: of the avatar.
        agent: identity of the agent it speaks for; frontends then show both as one.
        hours: validity for joining.
    """
    token = api.AccessToken(key, secret).with_identity(identity).with_kind("agent")
    token = token.with_ttl(datetime.timedelta(hours=hours))
    token = token.with_grants(api.VideoGrants(room_join=True, room=room))
    if agent:
        token = token.with_attributes({_ON_BEHALF: agent})
    return token.to_jwt()
