"""The Triton kernels against the closed forms, in Triton's interpreter: run by test_losses in a process of
its own, since Triton reads TRITON_INTERPRET when it is imported."""

import torch

from draft_opd.losses import chunked, fused_kernels
from draft_opd.losses.closed_form import CLOSED
from draft_opd.losses.divergences import cross_entropy, forward_kl, reverse_kl


def compare_with_closed_forms() -> None:
    """Any width, any stride, both types, far apart and equal distributions."""
    generator = torch.Generator().manual_seed(0)
    for columns, spread in ((5, 1.0), (4096, 3.0), (5000, 30.0)):
        for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 1e-2)):
            wide = torch.randn(3, 2 * columns, generator=generator).mul(spread).to(dtype)
            draft, target = wide[:, :columns].contiguous(), wide[:, columns:]  # another stride
            target[2] = draft[2]
            labels = torch.tensor([0, columns - 1, 2])
            for score, fused in fused_kernels.FUSED.items():
                given = draft.clone()
                found, slope = fused(given, target, labels, 0.7, 1.3)
                wanted, gradient = CLOSED[score](draft.float() * 0.7, target.float() * 1.3, labels, None)
                assert slope.data_ptr() == given.data_ptr() and slope.dtype == dtype
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
                torch.testing.assert_close(slope.float(), gradient * 0.7, rtol=bound, atol=bound)


def nan_stays_nan() -> None:
    """A step that is not finite must show."""
    for score, fused in fused_kernels.FUSED.items():
        for side in range(1 if score is cross_entropy else 2):
            logits = [torch.randn(2, 50) for _ in range(2)]
            logits[side][0, 7] = torch.nan
            found, _ = fused(*logits, torch.tensor([1, 2]), 1.0, 1.0)
            assert found.isnan().tolist() == [True, False]


def compare_losses() -> None:
    """Through `chunked_score`: values and gradients, a frozen and a trained head."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, states, heads = random(9, 6), random(9, 8), (random(300, 6), random(300, 8))
    labels, weights = torch.randint(0, 300, (9,), generator=generator), random(9)
    for score in (cross_entropy, forward_kl, reverse_kl):
        for trained in (False, True):
            found = []
            for fused in (False, True):
                chunked.available = lambda _, fused=fused: fused
                x, head = hidden.clone().requires_grad_(), heads[0].clone().requires_grad_(trained)
                options = {"draft_temperature": 1.5, "temperature": 0.8, "chunk": 4}
                if score is cross_entropy:
                    options |= {"labels": labels}
                else:
                    options |= {"teacher_hidden": states, "teacher_weight": heads[1]}
                values = chunked.chunked_score(score, x, head, **options)
                (values * weights).sum().backward()
                found.append((values.detach(), x.grad, *([head.grad] if trained else [])))
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    compare_with_closed_forms()
    nan_stays_nan()
    compare_losses()
