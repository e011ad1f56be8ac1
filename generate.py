"""Tailored synthetic negatives: mask phrases, refill, filter, select (section 3.3 of the paper).

A part of TAGS-DC (Fan et al., Findings of NAACL 2022) in PyTorch, MIT licence; this file and
losses.py stand on their own.

Integers in, integers out: no gradient, no tokenizer, no model of ours. The encoder comes in as
two callables, both in eval mode (dropout would blur the words drawn and the scores compared):

    fill(input_ids (n, T), image_index (n,), places (q,)) -> word logits (q, V) at `places`, flat
        positions in (n, T): encoder(input_ids, image_index).flatten(0, 1)[places], projected
    match(input_ids (n, T), image_index (n,)) -> matching logits (n,), or any score; higher = better

image_index says to which row of the batch, 0 .. B - 1, the image belongs. There may be no place to
fill, q = 0.

Letters: B pairs, T text positions, P phrases of a caption, M maskings of it, K refills of each,
N = M * K candidates, H kept negatives, C captions of an image, V vocabulary, W words of it that
may be written, q masked positions of all sentences together. Every mask: True = real / usable.

A worked example, M = 1, K = 3, H = 1 (phrases: "two", "dogs", "running on", "grass"):

    [CLS] two dogs running on grass [SEP]      the caption
    [CLS] two [MASK] running on grass [SEP]    mask_phrases; labels -1 -1 dogs -1 -1 -1 -1
    [CLS] two dogs running on grass [SEP]      refill_masks; dropped: it is the caption
    [CLS] two children running on grass [SEP]  the matcher scores it 0.71: kept
    [CLS] two horses running on grass [SEP]    the matcher scores it 0.62: not the hardest

Nothing here waits for a GPU, if the labels of `mask_phrases` lie on the CPU. So NaN from `fill`
or `match` raises NotFiniteError on a CPU alone; on a GPU any word may be written where `fill` gave
NaN, and a sentence whose score is not finite is not used."""

import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F


class NotFiniteError(ValueError):
    """The network gives NaN, as when its training has diverged."""


class Negatives(NamedTuple):
    """What `tailor_negatives` keeps of a batch."""

    sentences: torch.Tensor  # (B, H, T) ids; the caption itself where not valid
    valid: torch.Tensor  # (B, H) bool; False = the caption ran out of usable candidates
    labels: torch.Tensor  # (B, H, T) ids; the original word where it was replaced, else -1


def mask_phrases(
    input_ids, phrases, mask_id, vocabulary_range, maskings=1, probability=0.15, generator=None
):
    """Masks whole phrases of each caption, M times over.
    input_ids: (B, T) integers. phrases: (B, P, T) bool, which token belongs to which phrase (see
        `phrase_masks`). In a caption without any, or if this is None, every word is a phrase.
    vocabulary_range: (first, end) of the ordinary words; special tokens are never masked.
    probability: with which each phrase is masked (less where phrases overlap); if none of a caption
        is drawn, one at random is.
    Returns masked ids and labels, both (B, M, T); a label is the original word where it was
    masked, -1 elsewhere. Of the masked words 80% show mask_id, 10% a random one, 10% themselves."""
    first, end = vocabulary_range
    check_words("mask_id", mask_id, vocabulary_range)
    if not 0 <= probability <= 1:
        raise ValueError(f"probability {probability} is not in 0..1")
    ordinary = (input_ids >= first) & (input_ids < end)  # (B, T)
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int32, torch.int64):
        found = f"{input_ids.dtype} {tuple(input_ids.shape)}"
        raise ValueError(f"input_ids must be (B, T) integers of 32 or 64 bits, got {found}")
    B, T = input_ids.shape
    device = input_ids.device
    if phrases is None:
        phrases = ordinary.new_zeros(B, 0, T)
    if phrases.dim() != 3 or phrases.shape[::2] != (B, T) or phrases.dtype != torch.bool:
        found = f"{phrases.dtype} {tuple(phrases.shape)}"
        raise ValueError(f"phrases must be (B, P, T) = ({B}, P, {T}) torch.bool, got {found}")
    # Phrases of ordinary words alone; a caption without any gets one for each word.
    phrases = phrases & ordinary[:, None]  # (B, P, T)
    without = ~phrases.flatten(1).any(1)  # (B,)
    words = torch.eye(T, dtype=torch.bool, device=device) & ordinary[:, None]  # (B, T, T)
    phrases = torch.cat((phrases, words & without[:, None, None]), 1)
    P = phrases.size(1)
    # A token of f phrases brings each probability / f; a phrase's chance is its tokens' mean.
    member = phrases.float()
    share = probability / member.sum(1, keepdim=True).clamp(min=1)  # (B, 1, T)
    chance = (member * share).sum(2) / member.sum(2).clamp(min=1)  # (B, P)
    chosen = torch.rand(B, maskings, P, device=device, generator=generator) < chance[:, None]
    # One phrase at random where none was chosen: the highest of random tickets, empty ones last.
    tickets = torch.rand(B, maskings, P, device=device, generator=generator)
    tickets = tickets.masked_fill(~phrases.any(2)[:, None], -1.0)
    one = F.one_hot(tickets.argmax(2), P).bool()
    chosen = torch.where(chosen.any(2, keepdim=True), chosen, one)  # (B, M, P)
    masked = torch.matmul(chosen.float(), member) > 0  # (B, M, T)
    # What is shown in place of the masked words.
    original = input_ids[:, None].expand(B, maskings, T)
    coin = torch.rand(B, maskings, T, device=device, generator=generator)
    words = torch.randint(first, end, coin.shape, device=device, generator=generator)
    shown = torch.where(coin < 0.8, mask_id, torch.where(coin < 0.9, words.to(original), original))
    return torch.where(masked, shown, original), torch.where(masked, original, -1)


def check_words(name, special_id, vocabulary_range):
    """ValueError unless there are words to write, and a special token is none of them."""
    first, end = vocabulary_range
    if not first < end:
        raise ValueError(f"vocabulary_range {vocabulary_range} holds no word")
    if first <= special_id < end:
        raise ValueError(f"{name} {special_id} lies in vocabulary_range {vocabulary_range}")


def check_shapes(input_ids, captions, masked, labels):
    """ValueError unless these are (B, T), (B, C, T'), (B, M, T) and (B, M, T)."""
    B, T = input_ids.shape
    if captions.dim() != 3 or captions.size(0) != B:
        raise ValueError(f"captions must be (B, C, T') = ({B}, C, T'), got {tuple(captions.shape)}")
    if masked.dim() != 3 or masked.shape[::2] != (B, T) or labels.shape != masked.shape:
        shapes = f"{tuple(masked.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"masks must be two of (B, M, T) = ({B}, M, {T}), got {shapes}")


def refill_masks(
    fill,
    masked,
    labels,
    vocabulary_range,
    refills=1,
    temperature=1.5,
    truth_threshold=1.0,
    writer_images=None,
    allowed=None,
    chunk_size=512,
    generator=None,
):
    """Draws every masked position anew from softmax(logits / temperature), K times.
    masked, labels: (B, M, T) from `mask_phrases`; labels may lie on the CPU.
    truth_threshold: a word to which the own image gives a higher probability than this, among the
        words allowed, is likely true of it, and not drawn unless it is the original; 1 = off, as in
        the paper.
    writer_images: (B, M) long, the image that `fill` looks at for each masking; None = its own, as
        in the paper. With another one (`other_images`) a truth_threshold costs one pass more.
    allowed: (V,) bool: a word for which it is True gives way to such words alone, and so do those
        for which it is False to each other. With True for whole words and False for the ## pieces
        of BERT's vocabulary, a word is refilled with words and a piece with pieces. None = any.
    chunk_size: sentences in one call of `fill`.
    Returns candidates (B, M * K, T): the K refills of masking 0, then those of masking 1, ..."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} is below 1")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature} is not a finite number above 0")
    first, end = vocabulary_range
    B, M, T = masked.shape
    device = masked.device
    own_images = torch.arange(B, device=device).repeat_interleave(M)  # (B * M,)
    images = own_images
    if writer_images is not None:
        if writer_images.shape != (B, M):
            raise ValueError(f"writer_images must be ({B}, {M}), got {tuple(writer_images.shape)}")
        images = writer_images.flatten().to(device, non_blocking=True)
    candidates = []
    for start in range(0, B * M, chunk_size):
        chunk = slice(start, start + chunk_size)
        ids = masked.flatten(0, 1)[chunk]  # (n, T)
        # Where is a masked word, and which? Found where the labels lie, counted from the first.
        targets = labels.flatten(0, 1)[chunk].flatten()  # (n * T,)
        places = (targets >= 0).nonzero()[:, 0]  # (q,)
        originals = (targets[places, None].long() - first).to(device, non_blocking=True)  # (q, 1)
        places = places.to(device, non_blocking=True)
        logits = word_logits(fill, ids, images[chunk], places, vocabulary_range)  # (q, W)
        barred = torch.zeros_like(logits, dtype=torch.bool)
        if allowed is not None:
            barred = allowed[first:end] != allowed[originals + first]  # (q, W)
        if truth_threshold < 1:
            belief = logits
            if writer_images is not None:
                belief = word_logits(fill, ids, own_images[chunk], places, vocabulary_range)
            belief = word_probabilities(belief.masked_fill(barred, -math.inf))
            # The original may return, so that single words of a phrase can be wrong.
            barred = barred | (belief > truth_threshold).scatter(1, originals, False)
        logits = logits.masked_fill(barred, -math.inf)
        # Two draws or more: to check a single one torch would wait for a GPU.
        chances = word_probabilities(logits / temperature)
        words = torch.multinomial(chances, max(refills, 2), replacement=True, generator=generator)
        refilled = ids.flatten()[:, None].repeat(1, refills)  # (n * T, K)
        refilled[places] = (words[:, :refills] + first).to(ids.dtype)  # (q, K)
        candidates.append(refilled.view(-1, T, refills).transpose(1, 2))  # (n, K, T)
    return torch.cat(candidates).reshape(B, M * refills, T)


def other_images(B, M, generator=None, device=None):
    """For each masking another row of the batch, whose image the writer is to see: (B, M) long. Its
    own only if B is 1; if an image may stand in several rows, choose the rows yourself."""
    step = torch.randint(1, max(B, 2), (B, M), generator=generator, device=device)
    return (torch.arange(B, device=device)[:, None] + step) % B


def word_logits(fill, ids, images, places, vocabulary_range):
    """What `fill` says of the ordinary words (q, W), float32."""
    first, end = vocabulary_range
    logits = fill(ids, images, places)
    if logits.dim() != 2 or len(logits) != len(places) or logits.size(1) < end:
        raise ValueError(f"fill must return ({len(places)}, V >= {end}), got {tuple(logits.shape)}")
    return logits[:, first:end].float()


def word_probabilities(logits):
    """softmax (q, W). A row with NaN raises on a CPU; on a GPU it becomes all ones."""
    probabilities = logits.softmax(-1)
    missing = probabilities[:, :1].isnan()  # (q, 1); softmax spreads a NaN over its row
    if logits.device.type == "cpu" and missing.any():
        raise NotFiniteError("fill gave NaN, or no word a chance: no word can be drawn")
    return probabilities.masked_fill_(missing, 1.0)


def equals_a_caption(sentences, captions, pad_id):
    """Which of the sentences (B, N, T) equal one of their row's captions (B, C, T') -> (B, N)."""
    width = max(sentences.size(2), captions.size(2))
    sentences = F.pad(sentences, (0, width - sentences.size(2)), value=pad_id)
    captions = F.pad(captions, (0, width - captions.size(2)), value=pad_id)
    return (sentences[:, :, None] == captions[:, None]).all(3).any(2)


def usable_candidates(candidates, input_ids, captions, pad_id):
    """Which candidates (B, N, T) are negatives: neither the caption (B, T) that they were made
    from, nor another caption (B, C, T') of its image, nor equal to an earlier one -> (B, N)."""
    T = candidates.size(2)
    # Pairs are compared by a random key of each sentence, since comparing all N x N x T ids would
    # take much memory. Equal sentences have equal keys, others all but never.
    factors = torch.randint(2**62, (T,), generator=torch.Generator().manual_seed(0))
    keys = (candidates * factors.to(candidates.device, non_blocking=True)).sum(2)  # (B, N)
    repeats = (keys[:, :, None] == keys[:, None]).tril(-1).any(2)
    unchanged = (candidates == input_ids[:, None]).all(2)
    return ~repeats & ~unchanged & ~equals_a_caption(candidates, captions, pad_id)


def score_candidates(match, candidates, usable, chunk_size):
    """Matching logits (B, N) of candidates with the image of their row. On a CPU unusable ones get
    0 without being scored."""
    B, N, T = candidates.shape
    flat = candidates.flatten(0, 1)  # (B * N, T)
    wanted = torch.arange(B * N, device=flat.device)
    if flat.device.type == "cpu":
        wanted = wanted[usable.flatten()]
    scores = torch.zeros(B * N, device=flat.device)
    for start in range(0, len(wanted), chunk_size):
        chunk = wanted[start : start + chunk_size]
        logits = match(flat[chunk], chunk // N).float()
        if logits.shape != chunk.shape:
            raise ValueError(f"match must return ({len(chunk)},), got {tuple(logits.shape)}")
        if logits.device.type == "cpu" and logits.isnan().any():
            raise NotFiniteError("match gave NaN: no hardest sentence can be selected")
        scores[chunk] = logits
    return scores.view(B, N)


def select_hardest(scores, valid, h):
    """The h <= N highest-scoring usable candidates of each row.
    scores: (B, N) float, those not finite are not usable. valid: (B, N) bool, the usable ones.
    Returns index (B, h) long, hardest first, and kept (B, h) bool, False where a row ran out."""
    usable = valid & scores.isfinite()
    index = scores.float().masked_fill(~usable, -math.inf).topk(h, dim=1).indices
    return index, usable.gather(1, index)


@torch.no_grad()
def tailor_negatives(
    fill,
    match,
    input_ids,
    captions,
    *,
    pad_id,
    mask_id,
    vocabulary_range,
    phrases=None,
    maskings=20,
    probability=0.15,
    masks=None,
    refills=20,
    temperature=1.5,
    truth_threshold=1.0,
    writer_images=None,
    allowed=None,
    hard=31,
    chunk_size=512,
    generator=None,
):
    """Writes hard negatives for each caption: mask, refill, filter, select. A sentence that equals
    no known caption of the image counts as a negative, even if it happens to be true.
    fill, match: see the top of the file. input_ids: (B, T), the captions, padded with pad_id.
    captions: (B, C, T'), all true captions of each image, with the special tokens of input_ids and
        padded with pad_id on the right, too. What is compared are ids: two spellings of one text
        by other word pieces count as different.
    mask_id, vocabulary_range, phrases, maskings, probability: as in `mask_phrases`.
    masks: (masked, labels) of `mask_phrases`, to be shared with masked LM, in place of phrases,
        maskings and probability; None = drawn here.
    refills, temperature, truth_threshold, writer_images, allowed: as in `refill_masks`.
    hard: H, at most M * K. chunk_size: sentences in one call of fill or match.
    Returns Negatives. Valid sentences are pairwise different within a row, hardest first, and
    neither the caption nor one of `captions`; the others are the caption, with labels of -1.
    Raises ValueError for shapes and ids that do not fit each other."""
    check_words("mask_id", mask_id, vocabulary_range)
    check_words("pad_id", pad_id, vocabulary_range)
    if masks is None:
        masks = mask_phrases(
            input_ids, phrases, mask_id, vocabulary_range, maskings, probability, generator
        )
    masked, labels = masks
    check_shapes(input_ids, captions, masked, labels)
    if hard > masked.size(1) * refills:
        raise ValueError(f"hard {hard} exceeds {masked.size(1)} maskings x {refills} refills")
    candidates = refill_masks(  # (B, N, T)
        fill,
        masked,
        labels,
        vocabulary_range,
        refills=refills,
        temperature=temperature,
        truth_threshold=truth_threshold,
        writer_images=writer_images,
        allowed=allowed,
        chunk_size=chunk_size,
        generator=generator,
    )
    usable = usable_candidates(candidates, input_ids, captions, pad_id)  # (B, N)
    scores = score_candidates(match, candidates, usable, chunk_size)  # (B, N)
    index, valid = select_hardest(scores, usable, hard)  # (B, H) each
    sentences = candidates.gather(1, index[..., None].expand(-1, -1, candidates.size(2)))
    # Where a row ran out of usable candidates the caption itself stands, with labels of -1.
    sentences = sentences.where(valid[..., None], input_ids[:, None])
    replaced = sentences != input_ids[:, None]
    return Negatives(sentences, valid, torch.where(replaced, input_ids[:, None], -1))


# ---- phrases of a caption ----------------------------------------------------------------------


def phrase_masks(phrases, word_of_token):
    """The phrases of a caption as rows for `mask_phrases`.
    phrases: what `parse_phrases` returns, or the word positions of each phrase alone.
    word_of_token: (T,) integers, which word each token is a piece of; -1 = none, as of [CLS].
    Returns (P, T) bool, of the phrases that have a token; of none, a row for each word."""
    phrases = [phrase[1] if isinstance(phrase, tuple) else phrase for phrase in phrases]
    word_of_token = torch.as_tensor(word_of_token).tolist()
    if not any(word in phrase for phrase in phrases for word in word_of_token):
        phrases = [[word] for word in sorted({*word_of_token} - {-1})]
    rows = [[word in phrase for word in word_of_token] for phrase in phrases]
    member = torch.tensor(rows, dtype=torch.bool).view(len(rows), len(word_of_token))
    return member[member.any(1)]


# Tags: X in no phrase (articles, pronouns, auxiliaries, adverbs), P preposition, A frequent
# adjective or number, V frequent verb form. Other words go by their ending; the rest are nouns.
WORDS_OF_TAG = {
    ".": ".",
    "X": """a all an another both each either few half her his its many more most much no other
    others own same several some the their these this those my our your and as but how if or so
    that though what when where while he here herself him himself i it itself me she someone
    something them there they us we you which who ahead almost also apart away backwards forward
    just not outdoors indoors overhead sideways still together too upside very well yet s re
    ll ve d m n em til ca wo ai am are be been being can do does has have had is may was were will
    would could""",
    "P": """about above across after against along alongside among around at atop before behind
    below beneath beside between by down during for from in inside into like near of off on onto
    out outside over past through to toward towards under underneath up upon with within without""",
    "A": """adult alone antique asian asleep assorted back big black blue blurry bottom bright
    broken brown busy checkered clean clear cloudy colored colorful concrete crowded cute dark
    different dirty double dry eight elderly empty fast female five flat four french fresh front
    full furry giant gold grassy gray great green grey happy hard high hot huge large left light
    little lone long low lush male middle military mini modern multi multiple narrow nearby new
    next nice old older one open orange outdoor pink plain polar pretty purple ready red right
    ripe rocky round sandy seated silver single six small snowy square striped sunny tall tan
    three tiny top two various vintage wet white wide wild wooden yellow young""",
    "V": """built catch caught come contain cover cut drawn drive eat eaten enjoy fall feature
    fill fly get go hang held hold hung include jump laid lay lean lie lit look made make park
    pass play pull ride run say see seen set show shown sit ski stand surf swing take taken talk
    throw thrown try use wait walk watch wear worn""",
}
TAGS = {word: tag for tag, words in WORDS_OF_TAG.items() for word in words.split()}
# What tokenizers make of contractions: doesn't, doesnt, n't; dog's, 's or a lone s (in TAGS); and
# doesn before a t that stands by itself, with a quote between them or without.
QUOTES = "'`\u00b4\u2018\u2019\u02bc\u2032"
NEGATED = "(ai|are|ca|could|did|do|does|had|has|have|is|must|should|was|were|wo|would)n"
NOT = re.compile(f"({NEGATED}|n)[{QUOTES}]?t")
CLITIC = re.compile(f"[{QUOTES}]+(s|re|ll|ve|d|m)?$")
ARTICLES = ("a", "an", "the", "his", "her", "their", "its", "some")
PARTICIPLE = re.compile(r"..(ing|.ed)$")
LONG_PREPOSITION = re.compile(
    r"(in (the )?(middle|center|front|back) of|on (top|the side) of|next to|close to"
    r"|(out|off|ahead) of|(in|out)side of|in between|(in|on) to|because of|away from)\b"
)
# Over the tags: a preposition of several words is P, p, p .., T is "to" before a verb. Those before
# an object or a verb stand alone (a man in a hat, a tool for cutting), others belong to their verb.
PHRASE = re.compile(r"(?P<object>N+)|(?P<attribute>A)|(?P<relation>V(?:Pp*)*|[PT]p*(?=[XA]*[NV]))")


def parse_phrases(words, touching=None):
    """Words -> [(type, [word positions])], in order, disjoint.
    Objects are nouns with the nouns before them; attributes adjectives, numbers and participles,
    each alone; relations verbs with their prepositions, and prepositions between objects.
    touching: of each word whether no space stands before it; a "-" joins words only if it touches
        both. None = unknown, and it joins all but articles.
    >>> parse_phrases("A black dog is jumping over a fire hydrant".split())
    [('attribute', [1]), ('object', [2]), ('relation', [4, 5]), ('object', [7, 8])]"""
    joined = join_hyphens(words, touching)
    words = [word for word, _ in joined]
    tags = tag_words(words)
    for n in range(len(words)):
        several = LONG_PREPOSITION.match(" ".join(words[n : n + 4]))
        if several:
            end = n + len(several[0].split())
            tags[n:end] = "P" + "p" * (end - n - 1)
        elif words[n] == "to" and tags[n : n + 2] == ["P", "V"]:
            tags[n] = "T"
    phrases = []
    for match in PHRASE.finditer("".join(tags)):
        if match[0][0] not in "PT" or "N" in tags[: match.start()]:
            part = joined[match.start() : match.end()]
            phrases.append((match.lastgroup, [n for _, positions in part for n in positions]))
    return phrases


def join_hyphens(words, touching=None):
    """Words joined by hyphens count as one -> [(word, [positions])], lower case."""
    joined = []
    for n, word in enumerate(words):
        hyphen_before = n > 1 and is_hyphen(words, n - 1, touching)
        if hyphen_before or is_hyphen(words, n, touching):
            text, positions = joined[-1]
            joined[-1] = (text + word.lower(), [*positions, n])
        else:
            joined.append((word.lower(), [n]))
    return joined


def is_hyphen(words, n, touching):
    """Whether word n joins its neighbours: t-shirt, but not "a dog - a cat"."""
    if words[n] != "-" or not 0 < n < len(words) - 1:
        return False
    if touching is None:
        return words[n + 1].lower() not in ARTICLES
    return touching[n] and touching[n + 1]


def tag_words(words):
    """The tags of words in their context; X stands behind the last one and before the first."""
    words = [*words, ""]
    tags = [tag_word(word) for word in words]
    tag_contractions(words, tags)
    for n, word in enumerate(words):
        previous = words[n - 1]
        before = tags[n - 1]
        if tags[n] == "V":
            tags[n] = tag_verb(word, previous, before, tags[n + 1])
        elif tags[n] == "A" and tags[n + 1] in "PX." and (previous in ARTICLES or before == "P"):
            tags[n] = "N"  # the young
    return tags


def tag_contractions(words, tags):
    """Sets to X what only its neighbours show to be a part of a contraction."""
    is_quote = [word != "" and word in QUOTES for word in words]
    for n, word in enumerate(words):
        stem = n - 2 if is_quote[n - 1] else n - 1
        if word == "t" and re.fullmatch(NEGATED, words[stem]):  # won ' t
            tags[n] = tags[stem] = "X"
        elif len(word) == 1 and word.isalpha() and (is_quote[n - 1] or is_quote[n + 1]):
            tags[n] = "X"  # o ' clock


def tag_word(word):
    """The tag of a word by itself; of words with hyphens the last part decides."""
    word = word.rsplit("-", 1)[-1] or word
    word = word.lstrip(QUOTES)
    if NOT.fullmatch(word):
        return "X"
    word = CLITIC.sub("", word)  # of dog's and it's the word before the quote decides
    if word in TAGS:
        return TAGS[word]
    if not any(char.isalpha() for char in word):
        return "A" if word.isdigit() else "X"
    stems = (word.removesuffix("s"), word.removesuffix("es"))
    if PARTICIPLE.search(word) or any(TAGS.get(stem) == "V" for stem in stems):
        return "V"
    if word.endswith("ly"):
        return "X"
    return "A" if re.search(r"..(ful|less|ous|ish|[ai]ble|ive|ic|al)$", word) else "N"


def tag_verb(word, previous, before, after):
    """What seems a verb may be an adjective (a running dog) or a noun (a painting)."""
    if previous in ARTICLES or before == "A":
        return "A" if PARTICIPLE.search(word) and after == "N" else "N"
    if before in "PX." and word.endswith("ed") and after == "N":
        return "A"  # with crossed arms
    if before == "N" and not PARTICIPLE.search(word) and word[-1] not in "sn":
        return "V" if previous[-1] in "sn" else "N"  # a bus stop, but: dogs run
    return "V"
