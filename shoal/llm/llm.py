"""LLM: a model in the user's own program. `LLM(model=...).generate(prompts, SamplingParams(...))`, in vLLM's shapes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import weakref
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from shoal import log
from shoal.config.engine_config import EngineConfig
from shoal.config.model_path import resolve_model_path
from shoal.config.options import EMBEDDED_MODEL
from shoal.config.resolve import resolve
from shoal.config.sources import options_from_kwargs
from shoal.engine.pooled import pool, prepare_pairs, prepare_text, scores_of
from shoal.engine.prepare import PreparedRequest, Prompt
from shoal.engine.replicas import make_client
from shoal.engine.tokenizer import load_tokenizer
from shoal.errors import InvalidRequestError
from shoal.executor.node_agent import work_for_node_0
from shoal.llm.offline_engine import OfflineEngine
from shoal.llm.progress import PromptBar, StartupDisplay
from shoal.network.node_record import is_node
from shoal.protocol.pairs import make_pairs
from shoal.types.adapter import AdapterRef, LoRARequest
from shoal.types.outputs import RequestOutput
from shoal.types.pooling_outputs import EmbeddingOutput, EmbeddingRequestOutput, ScoringOutput, ScoringRequestOutput
from shoal.types.pooling_params import PoolingParams
from shoal.types.sampling_params import SamplingParams

_DRAW_SECONDS = 0.1

Output = TypeVar("Output")


class LLM:
    """One model, ready to generate. The engine runs in a subprocess that ends with `shutdown`, with this object, or
    with the program. Usable as a context manager, from several threads, and where an event loop runs already.

    When the engine dies, calls raise EngineDeadError with the reason, then and later: it is not started again.
    """

    def __init__(self, model: str = EMBEDDED_MODEL, **options: Any) -> None:
        """Load `model`; returns when it is ready.

        model: a Hugging Face directory, or shoal-tiny. options: named as the flags of `shoal serve` (`dtype`,
        `max_model_len`, `max_num_seqs`, `tensor_parallel_size`, `seed` …).
        On several machines (`nnodes`) the same script runs on each: where `node_rank` is above 0 this runs that
        machine's part of the model until the engine of node 0 ends, and then ends the script (SystemExit).
        Raises ConfigError (an unknown name with the nearest right one), ModelError, StartupError.
        """
        model_options, *others = options_from_kwargs({"model": model, **options})
        config = resolve(model_options, *others, is_node=is_node())
        if config.parallel.node_rank > 0:
            log.configure()
            work_for_node_0(config)
            raise SystemExit(0)
        path = str(resolve_model_path(model_options.tokenizer) if model_options.tokenizer else config.model.path)
        with StartupDisplay() as display:
            engine = OfflineEngine(
                config,
                lambda: make_client(config),
                lambda: (
                    None
                    if model_options.skip_tokenizer_init
                    else load_tokenizer(path, trust_remote_code=model_options.trust_remote_code)
                ),
                display.show,
            )
        self._attach(engine, config)

    @classmethod
    def over(cls, engine: OfflineEngine, config: EngineConfig) -> LLM:
        """An LLM over an engine that was started elsewhere, which it then owns."""
        llm = cls.__new__(cls)
        llm._attach(engine, config)
        return llm

    def _attach(self, engine: OfflineEngine, config: EngineConfig) -> None:
        self.config = config
        self._engine = engine
        # Runs when this object goes, and at the program's end if it is still there then.
        self._finalizer = weakref.finalize(self, engine.close)

    # --- generating ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; the outputs come in the order of the prompts.

        prompts: one or a list of: text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}.
        sampling_params: for all, or one for each prompt; None takes the model's defaults. use_tqdm: show a progress
        bar. priority: one for each prompt, lower is served first. lora_request: the adapter for all, or one or None for
        each (needs `enable_lora`). Nothing runs if one of the prompts is wrong.
        Raises InvalidRequestError, EngineDeadError.
        """
        several = _prompt_list(prompts)
        engine = self._engine.engine

        adapters = self._adapters(lora_request, len(several))

        def prepare(index: int, params: SamplingParams) -> PreparedRequest:
            own = priority[index] if priority else 0
            return engine.prepare(several[index], params, priority=own, adapter=adapters[index])

        if priority is not None and len(priority) != len(several):
            raise InvalidRequestError(
                f"{len(priority)} priorities for {len(several)} prompts; give one each", "priority"
            )
        return self._run(len(several), sampling_params, prepare, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations: one list of messages ({"role": …, "content": …}), or a list of such lists.

        chat_template: Jinja text, instead of the model's template. The rest is as for `generate`.
        """
        conversations = list(messages) if messages and not isinstance(messages[0], dict) else [messages]
        engine = self._engine.engine
        adapters = self._adapters(lora_request, len(conversations))

        def prepare(index: int, params: SamplingParams) -> PreparedRequest:
            return engine.prepare_chat(
                conversations[index],
                params,
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
                adapter=adapters[index],
            )

        return self._run(len(conversations), sampling_params, prepare, use_tqdm)

    def _adapters(
        self, given: LoRARequest | Sequence[LoRARequest | None] | None, num_prompts: int
    ) -> list[AdapterRef | None]:
        """Of each prompt; those that are new are loaded. Raises InvalidRequestError."""
        wanted = [given] * num_prompts if given is None or isinstance(given, LoRARequest) else list(given)
        if len(wanted) != num_prompts:
            raise InvalidRequestError(f"{len(wanted)} lora_requests for {num_prompts} prompts; give one each")
        named = [(each.lora_name, each.lora_path) for each in wanted if each is not None]

        async def load() -> list[AdapterRef]:  # in the thread of the engine, whose requests it looks at
            return self._engine.engine.adapters.find_or_load(named)

        loaded = iter(self._engine.run(load()) if named else ())
        return [None if each is None else next(loaded) for each in wanted]

    # --- vectors and scores ----------------------------------------------------------------------------------------

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Vectors of texts, from a model for embeddings; prompts, progress bar and order are as for `generate`.

        truncate_prompt_tokens: cut texts to so many tokens, or with -1 to what the model takes.
        Raises InvalidRequestError, EngineDeadError.
        """
        several, engine = _prompt_list(prompts), self._engine.engine
        params = msgspec.structs.replace(pooling_params or PoolingParams(), task="embed")

        def prepare(index: int) -> PreparedRequest:
            return prepare_text(engine, several[index], params, truncate=truncate_prompt_tokens)

        prepared = [_prepare_one(prepare, index, len(several)) for index in range(len(several))]
        results = self._collect_all(prepared, functools.partial(pool, engine), use_tqdm)
        return [
            EmbeddingRequestOutput(
                request.request_id,
                request.prompt,
                request.prompt_token_ids,
                EmbeddingOutput(result.numbers().tolist()),
                result.num_cached_tokens,
            )
            for request, result in zip(prepared, results, strict=True)
        ]

    def score(
        self,
        data_1: str | list[str],
        data_2: str | list[str],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
        chat_template: str | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well texts belong together: one and one, one (data_1) and several, or pair by pair.

        A model for scores reads both texts of a pair together; of one for embeddings it is the cosine of both vectors.
        chat_template: Jinja text that makes a pair's prompt of two messages, of the roles "query" and "document".
        Raises InvalidRequestError, EngineDeadError.
        """
        engine, params = self._engine.engine, pooling_params or PoolingParams()
        pairs = make_pairs(data_1, data_2, ("data_1", "data_2"))
        prepared = prepare_pairs(engine, pairs, params, truncate=truncate_prompt_tokens, chat_template=chat_template)
        scores = scores_of(prepared, self._collect_all(prepared.requests, functools.partial(pool, engine), use_tqdm))
        return [
            ScoringRequestOutput(
                each.parts[0].request.request_id,
                [token_id for part in each.parts for token_id in part.request.prompt_token_ids],
                ScoringOutput(each.score),
                sum(part.num_cached_tokens for part in each.parts),
            )
            for each in scores
        ]

    def _run(
        self,
        num_prompts: int,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        prepare: Callable[[int, SamplingParams], PreparedRequest],
        show_progress: bool,
    ) -> list[RequestOutput]:
        params = self._params_list(sampling_params, num_prompts)

        def prepare_with(index: int) -> PreparedRequest:
            return prepare(index, params[index])

        prepared = [_prepare_one(prepare_with, index, num_prompts) for index in range(num_prompts)]
        return self._collect_all(prepared, self._engine.engine.collect, show_progress)

    def _collect_all(
        self,
        prepared: Sequence[PreparedRequest],
        collect: Callable[[PreparedRequest], Awaitable[Output]],
        show_progress: bool,
    ) -> list[Output]:
        """The results of all requests, in order; if one fails, the others are ended too."""
        if not prepared:
            return []
        engine = self._engine.engine
        num_done = 0

        async def collect_one(request: PreparedRequest) -> Output:
            nonlocal num_done
            output = await collect(request)
            num_done += 1
            return output

        async def collect_all() -> list[Output]:
            tasks = [asyncio.ensure_future(collect_one(request)) for request in prepared]
            try:
                return await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise

        with PromptBar(len(prepared), engine.latest_stats, show_progress) as bar:
            future = self._engine.submit(collect_all())
            try:
                while True:
                    done, _ = concurrent.futures.wait([future], timeout=_DRAW_SECONDS if show_progress else None)
                    bar.show(num_done, engine.latest_stats)
                    if done:
                        return future.result()
            except KeyboardInterrupt:
                self._engine.cancel(future)
                raise

    def _params_list(
        self, params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * num_prompts
        if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
            raise InvalidRequestError(
                f"sampling_params must be SamplingParams or a list of them; got {params!r}", "sampling_params"
            )
        if len(params) != num_prompts:
            raise InvalidRequestError(
                f"{len(params)} sampling_params for {num_prompts} prompts; give one for all, or one each",
                "sampling_params",
            )
        return list(params)

    # --- the rest --------------------------------------------------------------------------------------------------

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given none: the model's generation_config.json over the usual defaults."""
        return SamplingParams(**self.config.model.generation_defaults)

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer. Raises InvalidRequestError with skip_tokenizer_init."""
        tokenizer = self._engine.engine.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("this LLM was made with skip_tokenizer_init=True; it has no tokenizer")
        return tokenizer.backend

    def reset_prefix_cache(self) -> None:
        """Forget the KV cache of earlier prompts."""
        self._engine.run(self._engine.engine.reset_prefix_cache())

    def shutdown(self) -> None:
        """End the engine and free its memory. The object cannot generate afterwards; a second call does nothing."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def _prompt_list(prompts: Any) -> list[Any]:
    """One prompt or many, as a list of prompts. A list of integers is one prompt."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if isinstance(prompts, Sequence) and not isinstance(prompts, (bytes, bytearray)):
        return [prompts] if prompts and isinstance(prompts[0], int) else list(prompts)
    raise InvalidRequestError(
        f"prompts must be a prompt or a list of prompts (text, or lists of token ids); got {type(prompts).__name__}",
        "prompts",
    )


def _prepare_one(prepare: Callable[[int], PreparedRequest], index: int, num_prompts: int) -> PreparedRequest:
    try:
        return prepare(index)
    except InvalidRequestError as error:
        if num_prompts == 1:
            raise
        raise InvalidRequestError(f"prompt {index} of {num_prompts}: {error}", error.param, error.code) from error
