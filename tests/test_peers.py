from types import SimpleNamespace

import pytest
import torch

from multisubject.benchmarks import peers
from multisubject.benchmarks.bases import DrawnBase
from multisubject.benchmarks.layout_guidance import layout_energy
from multisubject.benchmarks.peers import Peer, Seen, SoftmaxWatcher, agreement, box_mask, load_code, main
from multisubject.benchmarks.placement_tasks import draw_tasks
from multisubject.guidance_methods import HIDDEN, cones2, masked
from multisubject.residual_embeddings import parse_prompt
from multisubject.tests.test_guidance_methods import make_layer
from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.tiny_world.scenes import World

CODE = """
import not_installed
raise RuntimeError("only definitions are to be run")
LIMIT = 64

def sizes(flag=True, half=0.5):
    return {"weight_64": 64, "weight_65": 1, "64": flag, "half": half}, f"weight_{64}", helper()

class Kept:
    width = 64 // 2
"""


def test_code_runs_without_its_statements_and_with_other_numbers(tmp_path):
    (tmp_path / "first.py").write_text(CODE)
    (tmp_path / "second.py").write_text("def width():\n    return first.Kept.width + torch.ones(3).numel()\n")
    code = load_code([tmp_path / "first.py", tmp_path / "second.py"], {64: 16, 1: 7, 0.5: 0.25}, helper=lambda: "given")
    numbers, formatted, given = code.sizes()
    assert numbers == {"weight_16": 16, "weight_65": 7, "64": True, "half": 0.25}
    assert numbers["64"] is True
    assert (formatted, given, code.width()) == ("weight_16", "given", 16 // 2 + 3)
    assert not hasattr(code, "LIMIT")


def test_watcher_sees_the_factors_of_each_softmax():
    query, key, value = torch.randn(3, 2, 6, 4)
    products = (
        lambda: torch.matmul(query, key.transpose(-1, -2)),
        lambda: torch.einsum("bid,bjd->bij", query, key),
        lambda: torch.baddbmm(torch.empty(2, 6, 6), query, key.transpose(-1, -2), beta=0),
    )
    with SoftmaxWatcher() as watcher:
        for product in products:
            torch.bmm((product() + 1).softmax(dim=-1), value)
    assert len(watcher.seen) == len(products)
    for seen in watcher.seen:
        assert seen.query.equal(query)
        assert seen.key.equal(key)
        assert torch.allclose(seen.logits, query @ key.transpose(-1, -2) + 1)


def softmax_of(layer, method):
    """What a batch of two would show, whose last sample has the method's logits."""
    query, key = layer.query[0], layer.key[0]
    plain = query @ key.transpose(-1, -2) * layer.scale
    return Seen(*(torch.cat([torch.randn_like(x), x]) for x in (query, key, plain + method(layer)[0])))


def test_agreement_is_exact_for_the_same_method_and_measures_a_shift():
    layer = make_layer()
    same = agreement([(softmax_of(layer, cones2), layer)] * 2, cones2)
    assert same.layers == 2
    assert same.effect > 0.1
    assert same.logits < 1e-6
    assert same.attention < 1e-6

    shifted = agreement([(softmax_of(layer, lambda of: masked(of) + 0.25), layer)], masked)
    assert shifted.logits == pytest.approx(0.25, abs=1e-5)
    assert shifted.attention < 1e-6  # the softmax does not see it


def test_agreement_takes_hidden_for_hidden_and_tells_it_from_seen():
    layer = make_layer()
    assert agreement([(softmax_of(layer, lambda of: 1e20 * masked(of)), layer)], masked).logits < 1e-6
    assert agreement([(softmax_of(layer, lambda of: 0 * masked(of)), layer)], masked).logits > 900


class Masks(Peer):
    """A stand-in for somebody's code: phrases hidden outside their boxes, in a plain pipeline."""

    title, method, files = "Masks", "masked", ("code.py",)

    def draw(self, task, steps):
        spans = [parse_prompt(self.plain.tokenizer, task.prompt, {}).find(t.words).span for t in task.targets]

        def processor(attn, hidden_states, encoder_hidden_states=None, **_):
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            query, key, value = (
                attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
            )
            logits = torch.matmul(query, key.transpose(-1, -2)) * attn.scale
            if encoder_hidden_states is not None:
                for target, span in zip(task.targets, spans, strict=True):
                    outside = ~torch.from_numpy(box_mask(target.box, int(logits.shape[1] ** 0.5))).flatten()
                    logits[:, :, span] += HIDDEN * outside[:, None]
            return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(logits.softmax(dim=-1), value)))

        self.plain.unet.set_attn_processor(processor)
        generator = torch.Generator().manual_seed(task.seed)
        return self.plain(
            task.prompt, num_inference_steps=steps, guidance_scale=self.guidance_scale, generator=generator
        ).images[0]


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    (folder / "code.py").touch()
    return Masks(folder, DrawnBase.read(EMBEDDED_BASE), guidance_scale=5.0)


def test_a_peer_is_checked_layer_by_layer(masks, monkeypatch):
    monkeypatch.setattr(peers, "CHECK_STEPS", 2)
    ((kind, found),) = masks.check(draw_tasks("described 2", 1, 1, World())[0])  # self-attention is left alone
    assert kind == "cross"
    assert found.layers == len(masks.attentions)  # half of them are cross-attention, at two steps
    assert found.effect > 0.1
    assert found.logits < 1e-4

    monkeypatch.setattr(Masks, "method", "cones2")
    ((_, found),) = masks.check(draw_tasks("described 2", 1, 1, World())[0])
    assert found.logits > 1


def test_score_table_has_their_row_and_ours(masks):
    options = SimpleNamespace(num_pictures=2, num_inference_steps=2, seed=1)
    lines = list(peers.score_table([masks], World(), options))
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| described 2 | Masks, its code | 2 |")
    assert lines[3].startswith("| described 2 | Masks, our `masked` | 2 |")


@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_folder_without_the_code_is_one_line_that_names_the_option(peer, tmp_path, capsys):
    (tmp_path / peer.files[0]).parent.mkdir(exist_ok=True)
    (tmp_path / peer.files[0]).touch()
    for folder in (tmp_path / "missing", tmp_path):
        assert main([f"--{peer.method}", str(folder)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: --{peer.method}: {folder} has no ")
        assert error.count("\n") == 1


def test_no_folder_is_an_error(capsys):
    assert main([]) == 1
    assert "--cones2, --dense_diffusion, --bounded_attention, --layout_guidance" in capsys.readouterr().err


def test_a_base_of_another_architecture_is_refused(xl_base_path, tmp_path, capsys):
    assert main(["--cones2", str(tmp_path), "--base", xl_base_path]) == 1
    assert "is of Stable Diffusion XL; their code is for Stable Diffusion 1.x and 2.x." in capsys.readouterr().err


LAYOUT_CODE = """
def compute_ca_loss(attn_maps_mid, attn_maps_up, bboxes, object_positions):
    total, count = 0.0, 0
    for maps in [*attn_maps_mid, *attn_maps_up[0]]:
        size = int(math.sqrt(maps.shape[1]))
        cells = maps.unflatten(1, (size, size))
        for ((left, top, right, bottom),), tokens in zip(bboxes, object_positions):
            rows, columns = slice(int(top * size), int(bottom * size)), slice(int(left * size), int(right * size))
            for token in tokens:
                share = cells[:, rows, columns, token].sum(dim=(1, 2)) / cells[..., token].sum(dim=(1, 2))
                total += ((1 - share) ** 2).mean() / len(tokens)
        count += len(bboxes)
    return total / count
"""
INFERENCE_CODE = """
@hydra.main()
def main(settings):
    raise AssertionError


def inference(device, unet, vae, tokenizer, text_encoder, prompt, bboxes, phrases, cfg, logger):
    sampler = LMSDiscreteScheduler(num_train_timesteps=cfg.noise_schedule.num_train_timesteps)
    sampler.set_timesteps(cfg.inference.timesteps)
    assert sampler.config.prediction_type == cfg.noise_schedule.prediction_type
    latents = torch.randn(1, 4, 64, 64, requires_grad=True)
    embeds = text_encoder(tokenizer(prompt, return_tensors="pt").input_ids)[0]
    prediction, up, middle, _ = unet(latents, sampler.timesteps[0], encoder_hidden_states=embeds)
    words = phrases.replace(";", "").split()
    energy = compute_ca_loss(middle, up, bboxes, [[1 + prompt.split().index(word)] for word in words][: len(bboxes)])
    (gradient,) = torch.autograd.grad(energy, latents)
    assert gradient.abs().max() > 0
    assert prediction.sample.shape == latents.shape
    return [(cfg.inference, [maps.shape[1] for maps in (*middle, *up[0], *up[1])])]
"""


def test_layout_guidance_gives_their_code_maps_to_differentiate_and_compares_energies(tmp_path, monkeypatch):
    (tmp_path / "utils.py").write_text(LAYOUT_CODE)
    (tmp_path / "inference.py").write_text(INFERENCE_CODE)
    monkeypatch.setattr(peers, "CHECK_STEPS", 2)
    peer = peers.LayoutGuidance(tmp_path, DrawnBase.read(EMBEDDED_BASE), guidance_scale=5.0)
    (task,) = draw_tasks("described 2", 1, 1, World())
    settings, places = peer.draw(task, 25)
    assert (settings.timesteps, settings.max_index_step, settings.rand_seed) == (25, 5, task.seed)
    assert places == [4 * 4] + 2 * [8 * 8] + 2 * [16 * 16]

    ((_, found),) = peer.check(task)
    assert float(found.split("energies: ")[1].split(" |")[0]) < 1e-4
    monkeypatch.setattr(peers, "layout_energy", lambda layer: layout_energy(layer) + 0.01)
    ((_, found),) = peer.check(task)
    assert float(found.split("energies: ")[1].split(" |")[0]) == pytest.approx(0.01, rel=0.05)


BOXDIFF_CODE = """
class BoxDiffPipeline(StableDiffusionPipeline):
    def __call__(self, prompt: str, attention_store: AttentionStore, indices_to_alter: List[int], **settings: Any):
        GaussianSmoothing().cuda()
        ids = self.tokenizer(prompt).input_ids
        words = [self.tokenizer.decode(ids[index]) for index in indices_to_alter]
        return StableDiffusionPipelineOutput([(attention_store.model is self, words, settings)], None)
"""
STORE_CODE = """
class AttentionStore:
    pass

def register_attention_control(model, controller):
    controller.model = model
"""


def test_boxdiff_gets_the_last_token_of_each_phrase_and_boxes_in_pixels(tmp_path):
    for file, code in zip(
        peers.BoxDiff.files, ("class GaussianSmoothing: pass", STORE_CODE, BOXDIFF_CODE), strict=True
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(code)
    peer = peers.BoxDiff(tmp_path, DrawnBase.read(EMBEDDED_BASE), guidance_scale=5.0)
    (task,) = draw_tasks("described 2", 1, 1, World())
    registered, words, settings = peer.draw(task, 25)
    assert registered
    assert words == [target.words.split()[-1] for target in task.targets]
    assert settings["bbox"] == [[pytest.approx(512 * side, abs=0.5) for side in target.box] for target in task.targets]
    assert settings["thresholds"] == {0: 0.05, 5: 0.5, 10: 0.8} and settings["max_iter_to_alter"] == 12
    assert settings["generator"].initial_seed() == task.seed and settings["attention_res"] == 16
    assert list(peer.check(task)) == []
