"""Where the verdict draws its lines, and why there."""

#: A loss under subsets, adversaries or another ablation counts as withstood up to this many nats:
#: the paper's target of 0.15, and a third more, because the worst of many is always above the mean.
WITHSTOOD = 0.2
#: Without a necessary circuit, pairs are told apart at most this often: 0.5 is chance, and with a
#: hundred pairs or more 0.6 lies two standard errors or more above it. There is no lower limit: a
#: model that leans to the wrong answers does not do the task either, so it needs the circuit.
TOLD_APART = 0.6
#: A task has lost what it could do if its loss rises by half of what chance costs (0.693 / 2).
LOST = 0.35
#: Other tasks do without the circuit if they lose at most so many nats more than without random
#: nodes: a third of what counts as lost.
SPARED = 0.1
#: So large a share of parts without a noticeable effect is what a test at the 5 % level may leave,
#: and as much again for effects below the noise.
IDLE_PARTS = 0.1
#: Interchange effects of the circuit follow the model's if they correlate as much as this …
FOLLOWS = 0.9
#: … and are neither smaller nor larger than the model's by more than this factor.
LARGEST_SLOPE = 2.0
#: A task loss is measured well enough if its standard error is below a tenth of `WITHSTOOD`.
PRECISE = 0.02
#: The circuit is surer where the model is surer if the logit differences correlate at least so much
#: among prompts with the same answers: a quarter of the variance.
SURER = 0.5
#: Two searches find the same if at least half of the nodes of either are in both.
OVERLAP = 0.5
#: What is found where there is nothing to find must be so many times larger: by less, the size of a
#: circuit changes from seed to seed.
CONTROL_SIZE = 3
#: A circuit rests on errors that cancel if some subset multiplies its loss by more than this. By
#: less, the worst of 64 may be larger by chance.
RESTS_ON_LUCK = 2.0
