"""The smaller endpoints: models, tokens, embeddings, health and version."""

from __future__ import annotations

import asyncio
import base64
import struct
import uuid

from starlette.requests import Request
from starlette.responses import JSONResponse

from rooflight import __version__
from rooflight.serve.api.context import Context
from rooflight.serve.api.errors import ApiError
from rooflight.serve.api.http import read_body, tally_of, while_connected
from rooflight.serve.api.messages import encoded
from rooflight.serve.api.protocol import DetokenizeBody, EmbeddingBody, TokenizeBody, parse


async def models(request: Request) -> JSONResponse:
    """The names that the model is served by."""
    context: Context = request.app.state.context
    cards = [
        {
            "id": name,
            "object": "model",
            "created": context.created,
            "owned_by": "rooflight",
            "root": context.engine.settings.model,
            "parent": None,
            "max_model_len": context.engine.max_model_len,
        }
        for name in context.names
    ]
    wanted = request.path_params.get("name")
    if wanted is None:
        return JSONResponse({"object": "list", "data": cards})
    context.model_of(wanted)
    return JSONResponse(next(card for card in cards if card["id"] == wanted))


async def tokenize(request: Request) -> JSONResponse:
    """A prompt, or a conversation by the chat template, to token ids."""
    context: Context = request.app.state.context
    body = parse(TokenizeBody, await read_body(request, context.settings.max_body_mib))
    context.model_of(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", "prompt")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        ids = await context.tokens.encode(body.prompt, special=special, limit=False)
    else:
        ids = await encoded(context, body, special=bool(body.add_special_tokens))
    spelled = [context.tokens.text(token) for token in ids] if body.return_token_strs else None
    return JSONResponse(
        {"count": len(ids), "max_model_len": context.engine.max_model_len, "tokens": ids, "token_strs": spelled}
    )


async def detokenize(request: Request) -> JSONResponse:
    """Token ids to text."""
    context: Context = request.app.state.context
    body = parse(DetokenizeBody, await read_body(request, context.settings.max_body_mib))
    context.model_of(body.model)
    if body.tokens:
        context.tokens.check(body.tokens, "tokens")
    return JSONResponse({"prompt": context.tokens.tokenizer.decode(body.tokens)})


async def embeddings(request: Request) -> JSONResponse:
    """The last hidden state of each input."""
    context: Context = request.app.state.context
    body = parse(EmbeddingBody, await read_body(request, context.settings.max_body_mib))
    model, width = context.model_of(body.model), context.engine.config.width
    if len(body.input) > context.settings.max_prompts:
        most = context.settings.max_prompts
        raise ApiError(400, f"input has {len(body.input)} inputs; this server allows {most}", "input")
    if body.dimensions not in (None, width):
        raise ApiError(
            400, f"dimensions {body.dimensions} cannot be served; leave it out (the width is {width})", "dimensions"
        )
    special = body.add_special_tokens is not False
    prompts = [
        given if isinstance(given, list) else await context.tokens.encode(given, special=special)
        for given in body.input
    ]
    for ids in prompts:
        context.tokens.check(ids, "input")
        if len(ids) > context.engine.max_model_len:
            raise ApiError(
                400,
                f"the model's context is {context.engine.max_model_len} tokens; input has {len(ids)}",
                "input",
                "context_length_exceeded",
            )
    request_id = f"embd-{uuid.uuid4().hex}"

    async def work() -> list[list[float]]:
        return await asyncio.gather(
            *(context.engine.embed(ids, f"{request_id}-{number}") for number, ids in enumerate(prompts))
        )

    found = await while_connected(request.receive, work())
    used = tally_of(request).prompt_tokens = sum(len(ids) for ids in prompts)
    packed = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if packed else vector}
        for index, vector in enumerate(found)
    ]
    usage = {"prompt_tokens": used, "total_tokens": used}
    return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})


async def health(request: Request) -> JSONResponse:
    """200 while requests are served, 503 once the engine failed or the server drains."""
    context: Context = request.app.state.context
    if context.engine.errored:
        raise ApiError(503, "the engine has stopped", code="engine_dead")
    if context.closed:
        raise ApiError(503, "the server is shutting down", code="draining")
    return JSONResponse({"status": "ok"})


async def version(request: Request) -> JSONResponse:
    """The version of Rooflight."""
    return JSONResponse({"version": __version__})


def _packed(vector: list[float]) -> str:
    """Little-endian fp32 in base64, as OpenAI's clients ask for it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
