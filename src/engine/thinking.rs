//! A budget for reasoning: vLLM's `thinking_token_budget`.

use crate::step::TokenId;

/// Most tokens between the marker that opens reasoning and the one that closes it; then the latter is forced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThinkingBudget {
    pub max_tokens: usize,
    pub open: TokenId,
    pub close: TokenId,
}

/// Where one sequence stands. As in vLLM its first reasoning counts, whether the prompt or the output opens it.
#[derive(Clone, Debug)]
pub(super) struct ThinkingState {
    budget: ThinkingBudget,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Before,
    Inside { num_tokens: usize },
    After,
}

impl ThinkingState {
    pub fn new(budget: ThinkingBudget, prompt: &[TokenId]) -> Self {
        let is_marker = |id: &TokenId| *id == budget.open || *id == budget.close;
        let phase = match prompt.iter().rposition(is_marker) {
            Some(at) if prompt[at] == budget.open => Phase::Inside {
                num_tokens: prompt.len() - at - 1,
            },
            _ => Phase::Before,
        };
        Self { budget, phase }
    }

    /// Takes over an output token.
    pub fn push(&mut self, token: TokenId) {
        self.phase = match self.phase {
            Phase::Before if token == self.budget.open => Phase::Inside { num_tokens: 0 },
            Phase::Inside { .. } if token == self.budget.close => Phase::After,
            Phase::Inside { num_tokens } => Phase::Inside {
                num_tokens: num_tokens + 1,
            },
            phase => phase,
        };
    }

    /// The token that must come next; none = any may.
    pub fn forced(&self) -> Option<TokenId> {
        (self.tokens_left() == Some(0)).then_some(self.budget.close)
    }

    /// How many tokens certainly come before one is forced; none = none will be.
    pub fn tokens_before_forced(&self) -> Option<usize> {
        match self.phase {
            // The marker itself, then as many as the budget has.
            Phase::Before => Some(self.budget.max_tokens.saturating_add(1)),
            Phase::Inside { .. } => self.tokens_left(),
            Phase::After => None,
        }
    }

    /// None outside of reasoning.
    fn tokens_left(&self) -> Option<usize> {
        match self.phase {
            Phase::Inside { num_tokens } => Some(self.budget.max_tokens.saturating_sub(num_tokens)),
            Phase::Before | Phase::After => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: TokenId = 8;
    const CLOSE: TokenId = 9;

    /// For each token: what was forced before it, and how many could come before something is.
    fn run(max_tokens: usize, prompt: &[TokenId], output: &[TokenId]) -> Vec<(Option<TokenId>, Option<usize>)> {
        let budget = ThinkingBudget {
            max_tokens,
            open: OPEN,
            close: CLOSE,
        };
        let mut state = ThinkingState::new(budget, prompt);
        let mut seen = vec![(state.forced(), state.tokens_before_forced())];
        for &token in output {
            state.push(token);
            seen.push((state.forced(), state.tokens_before_forced()));
        }
        seen
    }

    #[test]
    fn reasoning_that_the_output_opens_is_closed_after_its_budget() {
        assert_eq!(
            run(2, &[1], &[5, OPEN, 5, 5, CLOSE, 5]),
            [
                (None, Some(3)),
                (None, Some(3)),
                (None, Some(2)),
                (None, Some(1)),
                (Some(CLOSE), Some(0)),
                (None, None),
                (None, None),
            ]
        );
        assert_eq!(run(0, &[], &[OPEN])[1], (Some(CLOSE), Some(0)));
    }

    #[test]
    fn the_prompt_may_have_opened_it_and_used_some() {
        assert_eq!(run(3, &[1, OPEN, 5], &[])[0], (None, Some(2)));
        assert_eq!(run(3, &[OPEN, 5, 5, 5, 5], &[])[0], (Some(CLOSE), Some(0)));
        assert_eq!(run(3, &[OPEN, 5, CLOSE, 1], &[])[0], (None, Some(4)), "history is over");
    }

    #[test]
    fn reasoning_that_ends_by_itself_is_not_limited_again() {
        assert_eq!(run(1, &[], &[OPEN, CLOSE, OPEN, 5, 5])[5], (None, None));
    }
}
