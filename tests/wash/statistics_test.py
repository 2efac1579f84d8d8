#!/usr/bin/python3
"""The statistics of vblk wash against those of R, on stored samples. Prints TAP."""

import argparse
import subprocess
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import Report  # noqa: E402

SAMPLES = Path(__file__).resolve().parent / "samples.txt"

# The same questions to R's own functions: t.test, pt, p.adjust, lm; what it has none for is written anew.
R_PROGRAM = r"""
answer <- function(values) cat(sprintf("%.12g", values), "\n")
for (line in readLines(file("stdin"))) {
  words <- strsplit(line, " ")[[1]]
  x <- as.numeric(words[-1])
  if (words[1] == "estimate") {
    test <- t.test(x, conf.level = 0.90)
    answer(c(mean(x), sd(x), test$conf.int))
  } else if (words[1] == "margin") {
    m <- x[1]; x <- x[-1]
    p <- function(mu, side) t.test(x, mu = mu, alternative = side)$p.value
    answer(c(max(p(m, "less"), p(-m, "greater")), p(m, "greater"), p(-m, "less"), p(m, "less"), p(-m, "greater")))
  } else if (words[1] == "holm") {
    answer(p.adjust(x, method = "holm"))
  } else if (words[1] == "bootstrap") {
    # Efron 1987, by other resamples, more of them, and a jackknife that leaves out for real.
    set.seed(20261130)
    n <- length(x)
    means <- colMeans(matrix(sample(x, n * 20000, replace = TRUE), nrow = n))
    bias <- qnorm(mean(means < mean(x)) + mean(means == mean(x)) / 2)
    left <- sapply(seq_len(n), function(i) mean(x[-i]))
    d <- mean(left) - left
    a <- sum(d^3) / (6 * sum(d^2)^1.5)
    at <- function(p) pnorm(bias + (bias + qnorm(p)) / (1 - a * (bias + qnorm(p))))
    answer(quantile(means, c(at(0.05), at(0.95)), names = FALSE))
  } else if (words[1] == "blocks") {
    # The exact power of two one-sided tests at a true difference of 0, by the distribution of the variance.
    power <- function(n) {
      inside <- function(u) pmax(0, 2 * pnorm(sqrt(n) * x[2] / x[1] - qt(0.95, n - 1) * sqrt(u / (n - 1))) - 1)
      # Not from 0 to infinity: there the peak is overlooked.
      integrate(function(u) inside(u) * dchisq(u, n - 1), qchisq(1e-10, n - 1), qchisq(1 - 1e-10, n - 1), subdivisions = 1000L)$value
    }
    most <- 2
    while (power(most) < x[3]) most <- 2 * most
    least <- most %/% 2 # too few; the answer is in between
    while (most - least > 1) {
      middle <- (least + most) %/% 2
      if (power(middle) < x[3]) least <- middle else most <- middle
    }
    answer(most)
  } else if (words[1] == "line") {
    half <- length(x) / 2
    fit <- lm(y ~ x, data = data.frame(x = x[1:half], y = x[(half + 1):(2 * half)]))
    answer(c(coef(fit), confint(fit, "x", level = 0.90), summary(fit)$r.squared))
  }
}
"""


def answers(command):
    output = subprocess.run(command, input=SAMPLES.read_bytes(), stdout=subprocess.PIPE, timeout=120, check=True).stdout
    return [[float(word) for word in line.split()] for line in output.decode().splitlines()]


def alike(ours, theirs):
    # A p value of 1e-14 is as good as one of 1e-16: what is left is rounding.
    return len(ours) == len(theirs) and all(abs(a - b) <= 1e-8 * abs(b) + 1e-11 for a, b in zip(ours, theirs))


def near(question, ours, theirs):
    """Two bootstraps differ by their resamples, some 2 % of the interval; the number of blocks is an approximation."""
    if question.startswith("bootstrap"):
        width = theirs[1] - theirs[0]
        return len(ours) == 2 and all(abs(a - b) <= 0.06 * width for a, b in zip(ours, theirs))
    if question.startswith("blocks"):
        return len(ours) == 1 and abs(ours[0] - theirs[0]) <= max(1, 0.02 * theirs[0])
    return alike(ours, theirs)


def percentile_interval(question):
    """A bootstrap interval without Efron's corrections: what a forgotten correction would give."""
    values = [float(word) for word in question.split()[1:]]
    random = Random(1)
    means = sorted(sum(random.choices(values, k=len(values))) / len(values) for _ in range(20000))
    return [means[1000], means[19000]]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    options = parser.parse_args()
    report = Report()
    questions = SAMPLES.read_text().splitlines()
    ours = answers([options.program])
    theirs = answers(["Rscript", "-e", R_PROGRAM])
    report.check("both answer every question", len(ours) == len(theirs) == len(questions), f"{len(ours)} and {len(theirs)}")
    for question, one, other in zip(questions, ours, theirs):
        report.check(f"R agrees on: {question}", near(question, one, other), f"vblk {one}\nR    {other}")
    # Of a skewed sample: there the corrections are more than what is tolerated.
    skewed = next(i for i, question in enumerate(questions) if question.startswith("bootstrap 0.01 0.02"))
    plain = percentile_interval(questions[skewed])
    report.check("canary: an interval without Efron's corrections is found", not near("bootstrap", plain, theirs[skewed]),
                 f"{plain} {theirs[skewed]}")
    # A comparison that finds nothing proves nothing.
    report.check("canary: an answer that is off by a millionth is found", not alike([1.000001], [1.0]))
    report.exit()


if __name__ == "__main__":
    main()
