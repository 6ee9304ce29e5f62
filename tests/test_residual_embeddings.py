import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from multisubject.residual_embeddings import ResidualEmbedding, add_residuals, find_token_spans, parse_prompt

# Words that the tiny vocabulary knows whole; all others fall into pieces, as rare words do with CLIP's.
WHOLE_WORDS = ["a", "photo", "of", "and", "dog", "cat", "red", "ball", "person", "guitar", "the", "beach", "on"]
TOKENIZER_CLASSES = {transformers.CLIPTokenizer, transformers.CLIPTokenizerFast}  # one class since transformers 5


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    letters = [chr(code) for code in range(33, 127)]
    merges: list[str] = []
    for word in WHOLE_WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[0]} {pieces[1]}"
            merges += [] if merge in merges else [merge]
            pieces[:2] = [pieces[0] + pieces[1]]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


@pytest.fixture(scope="session", params=sorted(TOKENIZER_CLASSES, key=str), ids=lambda cls: cls.__name__)
def tokenizer(request, tokenizer_folder):
    return request.param.from_pretrained(tokenizer_folder, model_max_length=77)


def subject(class_phrase, num_tokens=1, value=1.0, dim=4):
    return ResidualEmbedding(class_phrase, {"text_encoder": torch.full((num_tokens, dim), value)})


SUBJECTS = {
    "rex": subject("dog"),
    "bella": subject("dog"),
    "petrucci": subject("person"),
    "majesty": subject("guitar"),
    "round one": subject("red ball", 2),
}


def read(tokenizer, prompt, span):
    """What the text encoder reads at a span."""
    ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    return tokenizer.decode([ids[index] for index in span])


# --- Finding phrases


@pytest.mark.parametrize(
    ("prompt", "phrase", "spans"),
    [
        ("a photo of person and guitar on the beach", "person", [range(4, 5)]),
        ("a photo of person and guitar on the beach", "guitar", [range(6, 7)]),
        ("a photo of a Dog, cat", "dog", [range(5, 6)]),
        ("a dog, cat", "CAT", [range(4, 5)]),
        ("dog and dog", "dog", [range(1, 2), range(3, 4)]),
        ("a red  ball and a Red\nball.", "red ball", [range(2, 4), range(6, 8)]),
        ("a dog's ball", "dog", [range(2, 3)]),
        ("a dog (cat)", "cat", [range(4, 5)]),
        ("dogma, dogs, adog and dog", "dog", [range(-2, -1)]),
        ("zebra and dog", "zebra", [range(1, 6)]),
        ("a zigzag", "zigzag", [range(2, 8)]),
    ],
)
def test_phrase_is_found_by_position_as_whole_words(tokenizer, prompt, phrase, spans):
    found = find_token_spans(tokenizer, prompt, phrase)
    if spans[0].start < 0:  # counted from the end token
        end = len(tokenizer(prompt).input_ids)
        spans = [range(end + span.start, end + span.stop) for span in spans]
    assert found == spans
    for span in found:
        assert read(tokenizer, prompt, span).replace(" ", "") == phrase.lower().replace(" ", "")


words = st.sampled_from(["dog", "cat", "red", "ball", "zebra", "dogma", "guitar", "it's", "7", "Red", "DOG"])
gaps = st.sampled_from([" ", "  ", ", ", " - ", "\n", "; ", "! "])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(words, gaps), min_size=1, max_size=8), st.data())
def test_spans_agree_with_counting_word_by_word(tokenizer_folder, pairs, data):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer_folder, model_max_length=77)
    wanted = data.draw(st.sampled_from([word for word, _ in pairs])).lower()
    expected, position = [], 1
    for word, gap in pairs:
        length = len(tokenizer.tokenize(word))
        if word.lower() == wanted:
            expected.append(range(position, position + length))
        position += length + len(tokenizer.tokenize(gap.strip()))
    prompt = "".join(word + gap for word, gap in pairs)
    assert find_token_spans(tokenizer, prompt, wanted) == expected


def test_composed_and_decomposed_letters_are_the_same(tokenizer):
    composed = find_token_spans(tokenizer, "a café dog", "cafe\u0301")
    decomposed = find_token_spans(tokenizer, "a cafe\u0301 dog", "café")
    assert composed == decomposed
    assert composed[0].stop == find_token_spans(tokenizer, "a café dog", "dog")[0].start


def test_learned_token_counts_as_one_word_with_all_its_vectors(tokenizer_folder):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer_folder, model_max_length=77)
    tokenizer.add_tokens(["<dog>", "<dog>_1", "<dog>_2"])
    assert find_token_spans(tokenizer, "a <dog> and a dog", "dog") == [range(7, 8)]
    assert find_token_spans(tokenizer, "a <dog> and a dog", "<dog>") == [range(2, 5)]
    assert parse_prompt(tokenizer, "a <dog> and a <rex>", SUBJECTS).mentions[0].span == range(7, 8)


def test_missing_phrase_names_the_words_that_were_found(tokenizer):
    with pytest.raises(ValueError, match=r"'dog' is not in the prompt .*; the words found are 'a', 'cat', 'dogma'"):
        find_token_spans(tokenizer, "a cat, a dogma", "dog")


def test_phrase_that_the_tokenizer_joins_to_a_quote_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"'dog' is in the prompt .*, but the tokenizer joins it"):
        find_token_spans(tokenizer, "a 'dog'", "dog")


def test_empty_phrase_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="phrase ' ' is empty"):
        find_token_spans(tokenizer, "a cat", " ")


def test_phrase_beyond_the_token_limit_names_what_is_lost(tokenizer):
    prompt = "a cat and " * 25 + "dog and red ball"  # 75 tokens fit, and the dog is the 76th
    message = r"'dog' is cut off: the prompt has 79 tokens and the text encoder reads 75, so 'dog and red ball' is lost"
    with pytest.raises(ValueError, match=message):
        find_token_spans(tokenizer, prompt, "dog")
    with pytest.raises(ValueError, match=message):
        parse_prompt(tokenizer, prompt.replace("dog", "<rex>"), {"rex": subject("dog")})


def test_phrase_that_the_token_limit_cuts_in_two_is_an_error(tokenizer):
    prompt = "a " * 74 + "red ball"
    with pytest.raises(ValueError, match=r"'red ball' is cut off: .* so 'ball' is lost"):
        find_token_spans(tokenizer, prompt, "red ball")
    assert find_token_spans(tokenizer, prompt, "red") == [range(75, 76)]


def test_occurrence_before_the_token_limit_is_usable(tokenizer):
    parsed = parse_prompt(tokenizer, "a cat and " + "a " * 80 + "cat", {})
    assert parsed.find("cat", 1).span == range(2, 3)
    with pytest.raises(ValueError, match="'cat' is cut off"):
        parsed.find("cat", 2)


# --- Reading prompts


def test_two_dogs_get_a_span_each(tokenizer):
    parsed = parse_prompt(tokenizer, "a photo of <rex> and <bella>", SUBJECTS)
    assert parsed.text == "a photo of dog and dog"
    assert [(mention.subject, mention.span) for mention in parsed.mentions] == [
        ("rex", range(4, 5)),
        ("bella", range(6, 7)),
    ]
    assert parsed.find("bella").span == parsed.find("<bella>").span == range(6, 7)


def test_names_may_hold_spaces_and_any_case_and_stand_twice(tokenizer):
    parsed = parse_prompt(tokenizer, "<ROUND ONE>,<rex>,<Rex>", SUBJECTS)
    assert parsed.text == "red ball,dog,dog"
    assert [mention.subject for mention in parsed.mentions] == ["round one", "rex", "rex"]
    assert [mention.phrase for mention in parsed.mentions] == ["red ball", "dog", "dog"]
    assert parsed.find("rex", occurrence=2).span == range(6, 7)
    with pytest.raises(ValueError, match="'rex' is ambiguous: it stands 2 times"):
        parsed.find("rex")


def test_unknown_name_lists_the_loaded_ones(tokenizer):
    with pytest.raises(ValueError, match=r"'<slash>', which is not loaded: expected one of '<rex>', '<bella>'"):
        parse_prompt(tokenizer, "a photo of <slash>", SUBJECTS)
    with pytest.raises(ValueError, match="none, as no subject is loaded"):
        parse_prompt(tokenizer, "a photo of <slash>", {})


def test_lone_bracket_is_ordinary_text(tokenizer):
    assert parse_prompt(tokenizer, "i <3 dogs", SUBJECTS).text == "i <3 dogs"


def test_name_glued_to_other_letters_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="subject 'rex' runs into the characters beside it in 'two dogs'"):
        parse_prompt(tokenizer, "two <rex>s", SUBJECTS)


def test_plain_class_phrases_mean_the_loaded_subjects(tokenizer):
    parsed = parse_prompt(tokenizer, "a photo of Person and guitar on the beach", SUBJECTS)
    assert parsed.text == "a photo of Person and guitar on the beach"
    assert [(mention.subject, mention.span) for mention in parsed.mentions] == [
        ("petrucci", range(4, 5)),
        ("majesty", range(6, 7)),
    ]
    assert parsed.find("person").span == parsed.find("petrucci").span == range(4, 5)


def test_longest_plain_class_phrase_wins(tokenizer):
    subjects = {"any": subject("ball"), "round": subject("red ball", 2)}
    (mention,) = parse_prompt(tokenizer, "a red ball", subjects).mentions
    assert (mention.subject, mention.span) == ("round", range(2, 4))


def test_words_are_plain_beside_a_named_subject(tokenizer):
    parsed = parse_prompt(tokenizer, "<rex> and a dog and a guitar", SUBJECTS)
    assert [mention.subject for mention in parsed.mentions] == ["rex"]
    assert parsed.find("rex").span == range(1, 2)
    assert parsed.find("dog").span == range(4, 5), "the dog that is not rex"
    assert [parsed.find("dog", occurrence).span for occurrence in (1, 2)] == [range(1, 2), range(4, 5)]


def test_subject_named_like_its_class_phrase_counts_words(tokenizer):
    parsed = parse_prompt(tokenizer, "<dog> and a dog", {"dog": subject("dog")})
    assert parsed.find("dog").span == range(1, 2)
    assert parsed.find("dog", 2).span == range(4, 5)


def test_plain_phrase_shared_by_two_subjects_is_ambiguous(tokenizer):
    with pytest.raises(ValueError, match=r"the subjects 'rex', 'bella' all stand for it. Name .* '<rex>', '<bella>'"):
        parse_prompt(tokenizer, "a photo of a dog", SUBJECTS)


def test_of_many_subjects_that_share_a_phrase_the_first_few_are_listed(tokenizer):
    many = {f"dog{number}": subject("dog") for number in range(200)}
    with pytest.raises(ValueError, match=r"'dog7' and 192 more all stand for it. Name .* '<dog7>' and 192 more\.$"):
        parse_prompt(tokenizer, "a photo of a dog", many)


def test_plain_phrase_that_stands_twice_is_ambiguous(tokenizer):
    with pytest.raises(ValueError, match=r"'person' is ambiguous: it stands 2 times .* Write '<petrucci>'"):
        parse_prompt(tokenizer, "a person and a person", SUBJECTS)


def test_region_of_an_ambiguous_or_missing_phrase_is_an_error(tokenizer):
    parsed = parse_prompt(tokenizer, "<rex>, a cat, a cat", SUBJECTS)
    with pytest.raises(ValueError, match=r"'cat' is ambiguous: .* `occurrence` \(1 to 2\)"):
        parsed.find("cat")
    with pytest.raises(ValueError, match=r"occurrence 3 of phrase 'cat' does not exist: it stands 2 time\(s\)"):
        parsed.find("cat", 3)
    with pytest.raises(ValueError, match=r"'bella' is not in the prompt .* 'cat' and the subjects '<rex>'"):
        parsed.find("bella")


# --- Adding residuals


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_residuals_are_added_at_their_spans_alone(dtype):
    embeds = torch.randn(3, 77, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = embeds.clone()
    result = add_residuals(
        embeds, [(subject("dog", value=1.5), range(4, 5), 1.0), (subject("red ball", 2), range(6, 8), 0.5)]
    )
    expected = before.float().clone()
    expected[:, 4] += 1.5
    expected[:, 6:8] += 0.5
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(embeds, before, rtol=0, atol=0)


def test_no_residuals_change_nothing_and_share_nothing():
    embeds = torch.randn(77, 4, dtype=torch.float16)
    result = add_residuals(embeds, [])
    assert torch.equal(result, embeds) and result.data_ptr() != embeds.data_ptr()


def test_half_precision_sum_is_rounded_once():
    embeds, delta = torch.full((1, 4), 1.0, dtype=torch.float16), torch.full((1, 4), 2.0**-11 * 1.5)
    result = add_residuals(embeds, [(ResidualEmbedding("dog", {"text_encoder": delta}), range(1), 1.0)])
    assert torch.equal(result, (embeds.float() + delta).half())


def test_gradient_reaches_the_delta():
    delta = torch.zeros(1, 4, requires_grad=True)
    residual = ResidualEmbedding("dog", {"text_encoder": delta})
    add_residuals(torch.zeros(2, 77, 4), [(residual, range(3, 4), 2.0)]).sum().backward()
    assert delta.grad is not None and torch.equal(delta.grad, torch.full((1, 4), 4.0))


def test_other_text_encoder_has_its_own_delta():
    residual = ResidualEmbedding("dog", {"text_encoder": torch.ones(1, 4), "text_encoder_2": torch.ones(1, 6)})
    assert add_residuals(torch.zeros(77, 6), [(residual, range(1, 2), 1.0)], text_encoder="text_encoder_2").sum() == 6


@pytest.mark.parametrize(
    ("residuals", "message"),
    [
        ([(subject("dog", 2), range(4, 5), 1.0)], r"'dog' has shape \(2, 4\), expected \(1, 4\).*token index 4"),
        ([(subject("dog", dim=8), range(4, 5), 1.0)], r"'dog' has shape \(1, 8\), expected \(1, 4\)"),
        (
            [(subject("red ball", 2), range(76, 78), 1.0)],
            "token indices 76 to 77, expected indices within the 77 tokens",
        ),
        ([(subject("dog"), range(-1, 0), 1.0)], "token index -1, expected indices within"),
        (
            [(subject("dog"), range(4, 5), 1.0), (subject("red dog", 2), range(3, 5), 1.0)],
            "'dog' and 'red dog' overlap at token index 4",
        ),
        (
            [(ResidualEmbedding("dog", {"text_encoder_2": torch.ones(1, 4)}), range(4, 5), 1.0)],
            "no delta for 'text_enc",
        ),
    ],
)
def test_residual_that_does_not_fit_is_named(residuals, message):
    with pytest.raises(ValueError, match=message):
        add_residuals(torch.zeros(77, 4), residuals)
