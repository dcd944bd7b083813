//! Charts and pages of reports: SVG and HTML in themselves, without scripts, libraries and network.
//!
//! [`LineChart`], [`ScatterChart`] and [`HeatMap`] are plain data; their `svg` draws them. A
//! [`Page`] puts charts, text and tables into one file:
//!
//! ```
//! use tangent_train::report::{Axis, LineChart, Page, Series};
//!
//! let chart = LineChart {
//!     title: "Training loss".to_string(),
//!     x: Axis::linear("Step", ""),
//!     y: Axis::linear("Loss", "nats per token"),
//!     series: vec![Series {
//!         name: "lora".to_string(),
//!         points: vec![(1.0, 2.3), (2.0, 1.9), (3.0, 1.7)],
//!         band: Vec::new(),
//!     }],
//! };
//! let mut page = Page::new("A run");
//! page.paragraph("Three steps.").figure("Loss by step.", &chart.svg());
//! let html = page.finish();
//! ```
//!
//! - The same data give the same bytes: coordinates have two decimals, nothing is random.
//! - All data make a chart. Values without a place, such as NaN or zero on a logarithmic axis, are
//!   left out, counted by `dropped`, and said below the chart.
//! - Values of another scale can be held at the end of an axis ([`Axis::up_to`]), so that the others
//!   stay apart; the chart says how many are.
//! - Text and axes have the color of the text around the chart; colors of marks have enough
//!   contrast on light and on dark paper. Series also differ in dashes and markers, for print.
//! - Texts of charts and pages are plain text and are escaped; only `svg` of [`Page::figure`] is
//!   markup.

mod axis;
mod cell;
mod frame;
mod heat;
mod labels;
mod line;
mod marks;
mod page;
mod scatter;
mod svg;
#[cfg(test)]
mod well_formed;

pub use axis::{Axis, number};
pub use heat::{Arrangement, HeatMap, HeatPanel};
pub use line::{LineChart, Series};
pub use page::Page;
pub use scatter::{Front, ScatterChart, ScatterPoint, pareto_front};
