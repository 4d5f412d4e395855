//! The parts of a decoder layer. Each holds its weights and is generic over the backend; scratch space comes from the
//! [`Workspace`], so that a step allocates nothing.

pub mod attention;
pub mod moe;
pub mod short_conv;
pub mod swiglu;
pub mod workspace;

pub use attention::Attention;
pub use moe::Moe;
pub use short_conv::ShortConv;
pub use swiglu::SwiGlu;
pub use workspace::{Workspace, WorkspaceShape};
