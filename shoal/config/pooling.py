"""PoolingConfig: how a model makes a vector or scores of a text. Read from the checkpoint's files, without torch.

model_config.py asks `decoder_names` for the architecture below a head; resolve.py asks `pool` once --runner is known.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError, ModelError

RUNNERS = ("auto", "generate", "pooling")
_SCORE_SUFFIX = "ForSequenceClassification"
# What sentence-transformers calls a way of pooling, and what it is here.
_POOLINGS = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
_POOLING_MODES = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
# Families of encoders: the layers behind the first token's state that make scores.
_ENCODERS = {
    "Bert": ("pooler.dense", "classifier"),
    "Roberta": ("classifier.dense", "classifier.out_proj"),
    "XLMRoberta": ("classifier.dense", "classifier.out_proj"),
}
_ACTIVATIONS = {"sigmoid": "sigmoid", "identity": "identity", "softmax": "softmax"}
_DENSE_ACTIVATIONS = ("identity", "tanh", "relu", "gelu", "silu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseLayer:
    """A matrix behind the pooling, as sentence-transformers has them. directory: of its weights, below the model's."""

    directory: str
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolingConfig:
    """task: "embed" (a vector of the text) or "score" (num_labels numbers of it).

    kind: "last", "mean" or "cls": of the token whose hidden state is taken, or of all. normalize: to length 1.
    dimensions: lengths that embeddings may be cut to; empty: none; None: any up to the hidden size.
    label_token_ids: of (no, yes), where the score is what the language model's own head says between the two.
    activation: "sigmoid", "softmax" or "identity", over the scores. score_layers: the head's matrices in the
    checkpoint; two have biases, and a tanh between them. dense: what embeddings go through behind the pooling.
    sees_both_ways: an encoder: texts are read whole, in one step, and nothing is cached. num_segments: kinds of
    segments that it tells apart. max_length: of a text, as sentence-transformers cuts it; None: as far as the model
    reaches.
    """

    task: str
    kind: str = "last"
    normalize: bool = False
    dimensions: tuple[int, ...] | None = ()
    num_labels: int = 1
    label_token_ids: tuple[int, int] | None = None
    activation: str = "identity"
    score_layers: tuple[str, ...] = ("score",)
    sees_both_ways: bool = False
    num_segments: int = 1
    max_length: int | None = None
    dense: tuple[DenseLayer, ...] = ()

    def embedding_size(self, hidden_size: int) -> int:
        """hidden_size: of the model, which is also the embedding's where nothing stands behind the pooling."""
        return self.dense[-1].out_features if self.dense else hidden_size

    @property
    def needs_all_tokens(self) -> bool:
        """Whether a prompt's beginning must be computed for it, so that a prefix hit is of no use."""
        return self.kind != "last" or self.sees_both_ways


def decoder_names(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """`architectures` with those of a bare decoder, or of one with a head for scores, under the decoder's own name."""
    supported = set(known)

    def decoder(name: str) -> str:
        for suffix in (_SCORE_SUFFIX, "Model"):
            causal = name.removesuffix(suffix) + "ForCausalLM"
            if name.endswith(suffix) and causal in supported:
                return causal
        return name

    return [decoder(name) if name not in supported else name for name in names]


def parse_overrides(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """--hf-overrides: keys that replace those of config.json. Raises ConfigError."""
    if given is None:
        return {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ConfigError(f'hf_overrides must be a JSON object such as {{"key": 1}}: {error}') from None
    if not isinstance(given, Mapping):
        raise ConfigError(f"hf_overrides must be a JSON object; got {given!r:.100}")
    return dict(given)


def read_pooling(path: str, raw: Mapping[str, Any], hidden_size: int, runner: str) -> PoolingConfig | None:
    """What the model pools, or None: it generates. raw: its config.json. runner: what --runner says.

    Raises ModelError for a way of pooling that is not supported, ConfigError for a runner that the model cannot be.
    """
    named = raw.get("architectures") or []
    name = named if isinstance(named, str) else next(iter(named), "")
    modules = _Modules(Path(path))
    scores = name.endswith(_SCORE_SUFFIX)
    is_bare = name.endswith("Model") and not name.endswith("LMHeadModel")
    pools = scores or is_bare or modules.found or "classifier_from_token" in raw
    if runner == "generate" or (runner == "auto" and not pools):
        if scores or is_bare:
            raise ConfigError(
                f"{name} has no head to generate with; --runner auto or pooling serves its "
                f"{'scores' if scores else 'embeddings'}"
            )
        return None
    family = name.removesuffix(_SCORE_SUFFIX).removesuffix("Model")
    if family in _ENCODERS:
        encoder: dict[str, Any] = {"kind": "cls", "sees_both_ways": True, "num_segments": raw.get("type_vocab_size", 2)}
        if scores:
            return dataclasses.replace(_read_scores(raw), **encoder, score_layers=_ENCODERS[family])
        found = modules.read(raw, hidden_size)
        return dataclasses.replace(found, **encoder | ({"kind": found.kind} if modules.found else {}))
    if raw.get("is_causal") is False:
        raise ModelError(f"is_causal false is not supported for {name}: its tokens see those before them only")
    if "classifier_from_token" in raw:
        return PoolingConfig(
            task="score", label_token_ids=_label_tokens(Path(path), raw["classifier_from_token"]), activation="sigmoid"
        )
    if scores:
        return _read_scores(raw)
    return modules.read(raw, hidden_size)


def _read_scores(raw: Mapping[str, Any]) -> PoolingConfig:
    labels = raw.get("num_labels")
    if labels is None:  # Transformers writes the labels' names and counts those
        labels = len(raw.get("id2label") or {0: "", 1: ""})
    if not isinstance(labels, int) or isinstance(labels, bool) or labels < 1:
        raise ModelError(f"num_labels must be a positive integer; found {labels!r}")
    named = (raw.get("sentence_transformers") or {}).get("activation_fn") or raw.get(
        "sbert_ce_default_activation_function"
    )
    default = "sigmoid" if labels == 1 else "softmax"
    activation = default if named is None else _ACTIVATIONS.get(str(named).rpartition(".")[2].lower())
    if activation is None:
        raise ModelError(f"the activation {named!r} of scores is not supported; supported: Sigmoid, Identity, Softmax")
    return PoolingConfig(task="score", num_labels=labels, activation=activation)


def _dimensions(raw: Mapping[str, Any], hidden_size: int) -> tuple[int, ...] | None:
    listed = raw.get("matryoshka_dimensions")
    if listed is None:
        return None if raw.get("is_matryoshka") else (hidden_size,)
    if not isinstance(listed, list) or not all(type(size) is int and 0 < size <= hidden_size for size in listed):
        raise ModelError(f"matryoshka_dimensions must be numbers from 1 to {hidden_size}; found {listed!r:.100}")
    return tuple(sorted({*listed, hidden_size}))


class _Modules:
    """modules.json of sentence-transformers: the steps behind the decoder (pooling, normalisation)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        entries = _read(directory / "modules.json")
        self._entries = entries if isinstance(entries, list) else []
        self.found = any(self._kind(entry) == "Pooling" for entry in self._entries)

    @staticmethod
    def _kind(entry: Any) -> str:
        return str(entry.get("type", "")).rpartition(".")[2] if isinstance(entry, dict) else ""

    def read(self, raw: Mapping[str, Any], hidden_size: int) -> PoolingConfig:
        """Without the file: the last token's state, normalised. raw: the model's config.json."""
        if not self.found:
            return PoolingConfig(task="embed", normalize=True, dimensions=_dimensions(raw, hidden_size))
        kind, normalize, dense, size = "last", False, [], hidden_size
        for entry in self._entries:
            if normalize:
                raise ModelError(
                    f"{self._directory / 'modules.json'}: there is a module behind Normalize: {entry!r:.200}"
                )
            match self._kind(entry):
                case "Transformer":
                    pass
                case "Pooling":
                    kind = self._pooling(self._directory / str(entry.get("path", "")) / "config.json")
                case "Dense":
                    dense.append(self._dense(str(entry.get("path", "")), size))
                    size = dense[-1].out_features
                case "Normalize":
                    normalize = True
                case other:
                    raise ModelError(
                        f"{self._directory / 'modules.json'}: the module {other or entry!r} is not supported; "
                        "Transformer, Pooling, Dense and Normalize are"
                    )
        limits = _read(self._directory / "sentence_bert_config.json")
        longest = limits.get("max_seq_length") if isinstance(limits, dict) else None
        if longest is not None and (type(longest) is not int or longest < 1):
            raise ModelError(f"{self._directory / 'sentence_bert_config.json'}: max_seq_length is {longest!r}")
        return PoolingConfig(
            task="embed",
            kind=kind,
            normalize=normalize,
            dimensions=_dimensions(raw, size),
            max_length=longest,
            dense=tuple(dense),
        )

    def _dense(self, path: str, in_features: int) -> DenseLayer:
        file = self._directory / path / "config.json"
        config = _read(file)
        if not isinstance(config, dict):
            raise ModelError(f"{file} is missing or no JSON object; it says what the layer Dense is like")
        name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        activation = name.rpartition(".")[2].lower()
        if activation not in _DENSE_ACTIVATIONS:
            raise ModelError(
                f"{file}: activation_function {name} is not supported; {', '.join(_DENSE_ACTIVATIONS)} are"
            )
        for key in ("module_input_name", "module_output_name"):
            if config.get(key, "sentence_embedding") not in (None, "sentence_embedding"):
                raise ModelError(f"{file}: {key} {config[key]!r} is not supported; sentence_embedding is")
        found, size = config.get("in_features"), config.get("out_features")
        if found != in_features or type(size) is not int or size < 1:
            raise ModelError(
                f"{file}: {found!r} inputs and {size!r} outputs; what comes to it has {in_features} numbers"
            )
        return DenseLayer(
            directory=path,
            in_features=in_features,
            out_features=size,
            bias=bool(config.get("bias", True)),
            activation=activation,
        )

    def _pooling(self, path: Path) -> str:
        config = _read(path)
        if not isinstance(config, dict):
            raise ModelError(f"{path} is missing or no JSON object; it says how the model's states are pooled")
        named = config.get("pooling_mode")
        modes = [named] if named is not None else [key for key, on in config.items() if on is True and "_mode_" in key]
        kinds = [_POOLINGS.get(str(mode)) or _POOLING_MODES.get(str(mode)) for mode in modes]
        if len(kinds) != 1 or kinds[0] is None:
            raise ModelError(
                f"{path}: pooling {', '.join(map(str, modes)) or 'none'} is not supported; one of "
                f"{', '.join(_POOLING_MODES)} is"
            )
        return kinds[0]


def _label_tokens(directory: Path, labels: Any) -> tuple[int, int]:
    """classifier_from_token: the tokens for "no" and "yes", as text or ids."""
    if not isinstance(labels, list) or len(labels) != 2:
        raise ConfigError(
            'classifier_from_token must be two tokens, the one for "no" first, such as ["no", "yes"]; '
            f"got {labels!r:.100}"
        )
    tokenizer = _read(directory / "tokenizer.json")
    vocabulary = ((tokenizer or {}).get("model") or {}).get("vocab") or _read(directory / "vocab.json") or {}
    ids = [label if type(label) is int else vocabulary.get(label) if isinstance(vocabulary, dict) else None
           for label in labels]  # fmt: skip
    no, yes = ids
    if type(no) is not int or type(yes) is not int:
        raise ConfigError(
            f"classifier_from_token {labels!r:.100}: these are no tokens of tokenizer.json in {directory}; "
            "token ids work too"
        )
    return no, yes


def _read(path: Path) -> Any:
    """A JSON file; None if there is none. Raises ModelError for one that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
