"""
The second act of `demo.py`: the same small model, aligned with ELBO-KTO from thumbs instead of pairs.

1. take the pre-trained model of `demo.py`, or make it;
2. let it answer problems four times each, and mark every answer as right or wrong: no pairs, no answer but its own;
3. align it on the marked answers: `elbo_kto_lora.py`, which is the script for real models too;
4. answer held-out problems before and after.
"""

import demo

# What is pushed down has no floor: with equal weights of the classes one model unlearned nearly everything. At a fifth
# for wrong answers the right ones lead, those to problems that the model always solves among them; and a bolder
# learning rate is safe (docs/demo.md).
ALIGNMENT = demo.ALIGNMENT | {
    "loss_type": "kto",
    "batch_composition": "balanced",
    "beta": 0.3,
    "undesirable_weight": 0.2,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 16,  # as many responses as in eight pairs
}
ALIGNMENT.pop("loss_weights")

ELBO_KTO = demo.Act(
    method="ELBO-KTO",
    script="elbo_kto_lora.py",
    data="thumbs",
    columns=("prompt", "completion", "label"),
    settings=ALIGNMENT,
    watched="Loss and margin",
    reading="docs/elbo-kto-trainer.md says what the options do",
)

if __name__ == "__main__":
    demo.run(ELBO_KTO, __doc__)
