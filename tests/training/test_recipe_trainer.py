"""What RecipeTrainer and DistillationTrainer compute, against formulas and against models scaled by hooks."""

import copy
import math

import kinds
import pytest
import torch
from datasets import Dataset
from torch import nn

import recipe
import tiny
from hf_lnscale.training.arguments import RecipeConfig
from hf_lnscale.training.trainer import DistillationTrainer, RecipeTrainer
from oracles import with_hooked_norms

SCALES = [1.0, 2**-0.5, 3**-0.5, 0.5]


def arguments(folder, **changes):
    common = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_length": 24, "report_to": "none"}
    common |= {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
    common |= {"gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no", "max_steps": 3}
    return RecipeConfig(output_dir=str(folder), **(common | changes))


def rows(lengths, seed=0):
    return [{"input_ids": tiny.tokens(1, length, seed + i)[0].tolist()} for i, length in enumerate(lengths)]


def trainer(folder, model, data, cls=RecipeTrainer, **changes):
    data = Dataset.from_list(data)
    reader = recipe.tokenizer()  # pads, and nothing else: the rows are tokens already
    return cls(
        model=model, args=arguments(folder, **changes), train_dataset=data, eval_dataset=data, processing_class=reader
    )


def token_losses(model, ids):
    """Loss of each token but the first, float64."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        logits = model.eval().double()(ids).logits[0, :-1]
    return nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def hooked(family="llama"):
    return with_hooked_norms(tiny.model(family), tiny.FAMILIES[family][2], SCALES)


@pytest.mark.parametrize("settings", [{}, {"packing": True, "packing_strategy": "bfd"}, {"bf16": True}], ids=str)
def test_evaluation_loss_is_the_mean_over_tokens(settings, tmp_path):
    """Of texts of different lengths; packed, they do not see one another."""
    data = rows([3, 24, 5, 9, 17])
    expected = torch.cat([token_losses(hooked(), row["input_ids"]) for row in data])
    made = trainer(tmp_path, tiny.model(ln_scaling=True), data, **settings)
    found = made.evaluate()
    assert found["eval_loss"] == pytest.approx(expected.mean().item(), rel=3e-3 if settings.get("bf16") else 1e-5)
    assert found["eval_tokens"] == len(expected)
    if not settings:
        by_row = [token_losses(hooked(), row["input_ids"]) for row in data]
        # Cochran, Sampling Techniques, chapter 6: the ratio of two sums over rows.
        squares = sum((row.sum() - len(row) * expected.mean()).item() ** 2 for row in by_row)
        error = math.sqrt(5 / 4 * squares) / len(expected)
        assert found["eval_loss_stderr"] == pytest.approx(error, rel=1e-5)
        assert abs(sum(row.mean() for row in by_row) / 5 - expected.mean()) > 1e-3  # what it must not be


def test_one_row_has_no_standard_error(tmp_path):
    assert "eval_loss_stderr" not in trainer(tmp_path, tiny.model(), rows([9])).evaluate()


def test_completions_alone_are_learned(tmp_path):
    ids = rows([20, 24, 9])
    data = [row | {"completion_mask": [0] * 6 + [1] * (len(row["input_ids"]) - 6)} for row in ids]
    expected = torch.cat([token_losses(hooked(), row["input_ids"])[5:] for row in ids])
    made = trainer(tmp_path, tiny.model(ln_scaling=True), data, completion_only_loss=True)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)


SETTINGS = [
    {},
    {"gradient_accumulation_steps": 2},
    {"gradient_checkpointing": True},
    {"packing": True, "packing_strategy": "bfd"},
    {"packing": True, "packing_strategy": "wrapped"},
    {"bf16": True},
    {"completion_only_loss": True},
]
CASES = [*(("llama", settings) for settings in SETTINGS), ("gemma2", SETTINGS[0]), ("gemma2", SETTINGS[3])]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "settings"), CASES, ids=str)
def test_training_trains_the_scaled_model(settings, family, tmp_path):
    """The weights after three steps are those of a plain model whose norms' outputs are scaled by hooks."""
    data = [row | {"completion_mask": [0, 0] + [1] * (len(row["input_ids"]) - 2)} for row in rows([9, 24, 12, 20] * 4)]
    start = dict(tiny.model(family).named_parameters())

    def trained(model):
        trainer(tmp_path, model, data, learning_rate=1.0, **settings).train()
        return {name: (parameter - start[name]).detach() for name, parameter in model.named_parameters()}

    scaled, reference = trained(tiny.model(family, ln_scaling=True)), trained(hooked(family))
    for name in reference:
        assert reference[name].norm() > 0
        # In bfloat16 the scale is rounded on the weight here and on the output there.
        tolerance = 0.1 if settings.get("bf16") else 1e-4
        assert (scaled[name] - reference[name]).norm() < tolerance * reference[name].norm(), name


# --- distillation ---------------------------------------------------------------------------------------------------


def divergence(student, teacher, ids):
    """Forward KL of each predicted token, by its definition, on all logits in float64."""
    ids = torch.tensor([ids])
    p, q = (model.double()(ids).logits[0, :-1].log_softmax(-1) for model in (teacher, student))
    return (p.exp() * (p - q)).sum(-1)


def distiller(folder, student, teacher, data, **changes):
    return trainer(folder, student, data, cls=lambda **kwargs: DistillationTrainer(teacher, **kwargs), **changes)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_distillation_loss_is_the_divergence_and_so_is_its_gradient(family, tmp_path):
    """Gemma caps its logits, Granite divides them."""
    changes = {"final_logit_softcapping": 0.5} if family == "gemma2" else {}
    changes |= {"logits_scaling": 0.25} if family == "granite" else {}
    data = rows([7, 12])
    teacher, student = tiny.model(family, seed=1, **changes), tiny.model(family, ln_scaling=True, **changes)
    for model in (teacher, student):
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20)  # far from uniform
    reference, expert = tiny.model(family, ln_scaling=True, **changes).double(), tiny.model(family, **changes).double()
    reference.load_state_dict(student.state_dict())
    expert.load_state_dict(teacher.state_dict())

    expected = torch.cat([divergence(reference, expert, row["input_ids"]) for row in data]).mean()
    expected.backward()
    assert expected > 0.01
    made = distiller(tmp_path, student, teacher, data)
    batch = made._prepare_inputs(made.data_collator([made.train_dataset[i] for i in range(2)]))
    loss = made.compute_loss(made.model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    gradients = dict(reference.named_parameters())
    for name, parameter in student.named_parameters():
        if gradients[name].grad is not None:
            torch.testing.assert_close(parameter.grad.double(), gradients[name].grad, rtol=1e-3, atol=1e-6, msg=name)
    assert all(parameter.grad is None for parameter in teacher.parameters())


MULTIPLIED = {"cohere": "logit_scale", "hyperclovax": "logits_scaling", "falcon_h1": "lm_head_multiplier"}


@pytest.mark.parametrize("family", MULTIPLIED)
def test_logits_that_a_family_multiplies(family, tmp_path):
    data, pair = rows([7, 12]), []
    for seed in range(2):
        torch.manual_seed(seed)
        pair.append(kinds.model_class(family)(kinds.config(family, **{MULTIPLIED[family]: 20.0})).eval())
    teacher, student = (copy.deepcopy(model) for model in pair)
    expected = torch.cat([divergence(pair[1], pair[0], row["input_ids"]) for row in data]).mean().item()
    made = distiller(tmp_path, student, teacher, data)
    batch = made._prepare_inputs(made.data_collator([made.train_dataset[i] for i in range(2)]))
    assert expected > 0.01
    assert made.compute_loss(made.model, batch).item() == pytest.approx(expected, rel=1e-3)


def test_heads_that_are_padded(tmp_path):
    """Rows after the tokens' are padding, of the teacher or of the student: whatever is in them, they are no tokens."""
    data, found = rows([7, 12]), []
    for padding in ((0, 0), (8, 0), (0, 8)):
        pair = tiny.model(seed=1), tiny.model(ln_scaling=True)
        for model, more in zip(pair, padding, strict=True):
            model.resize_token_embeddings(300 + more, mean_resizing=False)
            with torch.no_grad():
                model.get_output_embeddings().weight[tiny.VOCAB : 300] = 0.0
                model.get_output_embeddings().weight[300:] = 9.0
        made = distiller(tmp_path, pair[1], pair[0], data)
        batch = made._prepare_inputs(made.data_collator([made.train_dataset[i] for i in range(2)]))
        found.append(made.compute_loss(made.model, batch).item())
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-6)


def test_distillation_evaluates_the_language_model(tmp_path):
    data = rows([7, 12, 20])
    student = tiny.model(ln_scaling=True)
    expected = torch.cat([token_losses(hooked(), row["input_ids"]) for row in data]).mean().item()
    made = distiller(tmp_path, student, tiny.model(seed=1), data)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_distillation_adds_up_over_accumulated_batches(tmp_path):
    """Batches of other lengths: each token counts as much as any other."""
    data = rows([7, 23, 12, 4] * 3)

    def trained(**changes):
        student = tiny.model(ln_scaling=True)
        made = distiller(tmp_path, student, tiny.model(seed=1), data, **changes)
        made.train()
        return student.state_dict()

    whole = trained(per_device_train_batch_size=4)
    parts = trained(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def test_a_teacher_of_its_own_student_teaches_nothing(tmp_path):
    made = distiller(tmp_path, tiny.model(), tiny.model(), rows([7, 12]))
    batch = made._prepare_inputs(made.data_collator([made.train_dataset[i] for i in range(2)]))
    assert math.isclose(made.compute_loss(made.model, batch).item(), 0.0, abs_tol=1e-6)
