#!/usr/bin/python3
"""The statistics of vblk wash against those of R, on stored samples. Prints TAP."""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import Report  # noqa: E402

SAMPLES = Path(__file__).resolve().parent / "samples.txt"

# The same questions to R's own functions: t.test, pt, p.adjust, lm.
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
    answer(c(max(p(m, "less"), p(-m, "greater")), p(m, "greater"), p(-m, "less")))
  } else if (words[1] == "holm") {
    answer(p.adjust(x, method = "holm"))
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
        report.check(f"R agrees on: {question}", alike(one, other), f"vblk {one}\nR    {other}")
    # A comparison that finds nothing proves nothing.
    report.check("canary: an answer that is off by a millionth is found", not alike([1.000001], [1.0]))
    report.exit()


if __name__ == "__main__":
    main()
