//! Heat maps: a value for each row and column, in several panels with one color bar.

use super::axis::{Scale, number, shows};
use super::cell::{draw_cell, viridis};
use super::frame::{draw_notes, draw_title, fitting_ticks};
use super::svg::{Area, FONT, LINE, Point, Svg, text_width};

/// Largest width in pixels, unless there are very many columns.
const WIDTH: f64 = 1040.0;
/// Smallest width, for title, color bar and notes.
const LEAST_WIDTH: f64 = 560.0;
/// Height and widths of cells: beside other panels, and in a panel alone.
const ROW: f64 = 16.0;
const COLUMN: f64 = 14.0;
const WIDEST: f64 = 28.0;
const NARROWEST: f64 = 4.0;
/// Free pixels between panels.
const GAP: f64 = 26.0;
/// A panel of few columns is as wide, for its title.
const LEAST_PANEL: f64 = 84.0;
/// Room for names of rows and of columns.
const ROW_ROOM: f64 = 150.0;
const COLUMN_ROOM: f64 = 70.0;
const BAR: f64 = 260.0;
const BAR_STEPS: usize = 52;

/// How panels are laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arrangement {
    /// As many side by side as fit on a page, then the next line of panels.
    #[default]
    SideBySide,
    /// One below the other, so that a column is above itself.
    Rows,
}

/// One of the maps, such as a step of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeatPanel {
    /// Stands above the panel.
    pub title: String,
    /// Values by row, then by column; what is missing or not finite is hatched.
    pub values: Vec<Vec<Option<f64>>>,
    /// What is shown while the pointer is over a cell, by row, then by column. Where there is none,
    /// or it is empty, that is the names of the cell and its value.
    pub titles: Vec<Vec<String>>,
}

/// Values by row and column, in panels that share rows, columns and colors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeatMap {
    /// Stands above the chart, unless it is empty.
    pub title: String,
    /// Names of rows from top to bottom, such as kinds of sites.
    pub rows: Vec<String>,
    /// Names of columns from left to right, such as numbers of layers.
    pub columns: Vec<String>,
    /// What columns are, such as `Layer`.
    pub column_title: String,
    /// What values are, with their unit if they have one.
    pub value_title: String,
    /// Values of the first and the last color, which values beyond have, too; without a range, the
    /// smallest and the largest value.
    pub range: Option<(f64, f64)>,
    /// The maps.
    pub panels: Vec<HeatPanel>,
    /// How they are laid out.
    pub arrangement: Arrangement,
}

impl HeatPanel {
    fn value(&self, row: usize, column: usize) -> Option<f64> {
        let value = self.values.get(row)?.get(column).copied().flatten();
        value.filter(|value| shows(*value, false))
    }

    fn title(&self, row: usize, column: usize) -> Option<&str> {
        let title = self.titles.get(row)?.get(column)?;
        Some(title.as_str()).filter(|title| !title.is_empty())
    }
}

impl HeatMap {
    /// How many values are not drawn: those that are not finite, and those without a name of their
    /// row or column. The chart says so, too.
    pub fn dropped(&self) -> usize {
        let given = |panel: &HeatPanel| panel.values.iter().flatten().flatten().count();
        let given: usize = self.panels.iter().map(given).sum();
        given - self.shown().count()
    }

    /// The chart as an SVG element.
    pub fn svg(&self) -> String {
        let layout = Layout::new(self);
        let scale = self.scale();
        let notes = self.notes();
        let bar_top = layout.bottom() + 10.0;
        let notes_top = bar_top + 2.0 * LINE + 24.0;
        let height = notes_top + LINE * notes.len() as f64 + 4.0;

        let mut svg = Svg::new(layout.width, height, &self.title);
        draw_title(&mut svg, &self.title, layout.width);
        if self.is_empty() {
            let at = (layout.width / 2.0, layout.top + LINE);
            svg.text(at, "no data", layout.width, &[("text-anchor", "middle")]);
        }
        for (i, panel) in self.panels.iter().enumerate() {
            let corner = layout.corner(i);
            self.draw_names(&mut svg, &layout, corner, i.is_multiple_of(layout.per_line));
            self.draw_panel(&mut svg, &layout, corner, panel, &scale);
        }
        self.draw_bar(&mut svg, (20.0, bar_top), &scale);
        draw_notes(&mut svg, notes_top, layout.width, &notes);
        svg.finish()
    }

    fn is_empty(&self) -> bool {
        self.panels.is_empty() || self.rows.is_empty() || self.columns.is_empty()
    }

    /// All values that are drawn.
    fn shown(&self) -> impl Iterator<Item = f64> {
        let row = move |row| (0..self.columns.len()).map(move |column| (row, column));
        self.panels.iter().flat_map(move |panel| {
            let cells = (0..self.rows.len()).flat_map(row);
            cells.filter_map(move |(row, column)| panel.value(row, column))
        })
    }

    fn scale(&self) -> Scale {
        let range = self
            .range
            .filter(|(low, high)| shows(*low, false) && shows(*high, false));
        let (low, high) = range.unwrap_or_else(|| {
            let ends = (f64::INFINITY, f64::NEG_INFINITY);
            self.shown()
                .fold(ends, |(low, high), v| (low.min(v), high.max(v)))
        });
        Scale::exact(low, high)
    }

    fn notes(&self) -> Vec<String> {
        match self.dropped() {
            0 => Vec::new(),
            dropped => vec![format!(
                "Values not shown, since they are not finite or have no named place: {dropped}"
            )],
        }
    }

    /// Names of rows, at the first panel of a line, and of as many columns as there is room for.
    fn draw_names(&self, svg: &mut Svg, layout: &Layout, corner: Point, first: bool) {
        let below = corner.1 + ROW * self.rows.len() as f64 + FONT + 3.0;
        if first {
            let right = [("text-anchor", "end")];
            for (i, name) in self.rows.iter().enumerate() {
                let at = (corner.0 - 6.0, corner.1 + ROW * (i as f64 + 0.75));
                svg.text(at, name, ROW_ROOM, &right);
            }
            svg.text(
                (corner.0 - 6.0, below),
                &self.column_title,
                ROW_ROOM,
                &right,
            );
        }
        let names = self.columns.iter().enumerate();
        for (i, name) in names.step_by(layout.every) {
            let x = corner.0 + layout.column * (i as f64 + 0.5);
            svg.text((x, below), name, COLUMN_ROOM, &[("text-anchor", "middle")]);
        }
    }

    fn draw_panel(
        &self,
        svg: &mut Svg,
        layout: &Layout,
        corner: Point,
        panel: &HeatPanel,
        scale: &Scale,
    ) {
        let above = (corner.0, corner.1 - 5.0);
        svg.text(above, &panel.title, layout.panel, &[]);
        svg.group(&[("shape-rendering", "crispEdges")], |svg| {
            for (row, row_name) in self.rows.iter().enumerate() {
                for (column, column_name) in self.columns.iter().enumerate() {
                    let cell = layout.cell(corner, row, column);
                    let value = panel.value(row, column);
                    let title = match (panel.title(row, column), value) {
                        (Some(title), _) => title.to_string(),
                        (None, Some(value)) => {
                            self.words(panel, row_name, column_name, &number(value))
                        }
                        (None, None) => self.words(panel, row_name, column_name, "no value"),
                    };
                    draw_cell(svg, &cell, value.map(|value| scale.place(value)), &title);
                }
            }
        });
        let outline = Area {
            left: corner.0,
            top: corner.1,
            right: corner.0 + layout.column * self.columns.len() as f64,
            bottom: corner.1 + ROW * self.rows.len() as f64,
        };
        let looks = [
            ("fill", "none"),
            ("stroke", "currentColor"),
            ("stroke-opacity", "0.5"),
            ("pointer-events", "none"),
        ];
        svg.rect(&outline, &looks, "");
    }

    fn words(&self, panel: &HeatPanel, row: &str, column: &str, value: &str) -> String {
        let place = format!("{row}, {} {column}: {value}", self.column_title);
        format!("{}\n{place}", panel.title).trim().to_string()
    }

    /// Title, colors and ticks, and what hatching means if there is any.
    fn draw_bar(&self, svg: &mut Svg, (left, top): Point, scale: &Scale) {
        svg.text((left, top + FONT), &self.value_title, BAR * 2.0, &[]);
        let top = top + LINE;
        let width = BAR / BAR_STEPS as f64;
        svg.group(&[("shape-rendering", "crispEdges")], |svg| {
            for i in 0..BAR_STEPS {
                let step = Area {
                    left: left + width * i as f64,
                    top,
                    right: left + width * (i as f64 + 1.0),
                    bottom: top + 14.0,
                };
                let share = i as f64 / (BAR_STEPS - 1) as f64;
                svg.rect(&step, &[("fill", viridis(share).as_str())], "");
            }
        });
        for tick in fitting_ticks(scale, BAR) {
            let x = left + scale.place(tick.value) * BAR;
            let ends = ((x, top + 14.0), (x, top + 18.0));
            svg.line(ends.0, ends.1, &[("stroke", "currentColor")]);
            let at = (x, top + 30.0);
            svg.text(at, &tick.label, f64::INFINITY, &[("text-anchor", "middle")]);
        }
        let cells = self.panels.len() * self.rows.len() * self.columns.len();
        if self.shown().count() < cells {
            let sample = Area::around((left + BAR + 50.0, top + 7.0), COLUMN, ROW - 2.0);
            draw_cell(svg, &sample, None, "");
            svg.text((sample.right + 8.0, top + 11.0), "no value", BAR, &[]);
        }
    }
}

/// Where panels and cells are.
struct Layout {
    width: f64,
    /// Left end and top of the first panel's line, the line of titles included.
    left: f64,
    top: f64,
    /// Width of a column and of a panel.
    column: f64,
    panel: f64,
    /// Height of a line of panels with titles and names of columns.
    line: f64,
    lines: usize,
    per_line: usize,
    /// Each such column has its name below it.
    every: usize,
}

impl Layout {
    fn new(map: &HeatMap) -> Self {
        let names = map.rows.iter().chain([&map.column_title]);
        let names = names.map(|name| text_width(name).min(ROW_ROOM));
        let left = names.fold(0.0, f64::max) + 12.0;
        let room = WIDTH - left - 8.0;
        let columns = map.columns.len().max(1) as f64;
        let panels = map.panels.len().max(1);
        let side_by_side = (room + GAP) / ((columns * COLUMN).max(LEAST_PANEL) + GAP);
        let per_line = match map.arrangement {
            Arrangement::SideBySide => (side_by_side as usize).clamp(1, panels),
            Arrangement::Rows => 1,
        };
        let column = if per_line > 1 {
            COLUMN
        } else {
            (room / columns).clamp(NARROWEST, WIDEST)
        };
        let panel = (columns * column).max(LEAST_PANEL);
        let width = left + (panel + GAP) * per_line as f64 - GAP + 8.0;
        let names = map.columns.iter();
        let widest = names.map(|name| text_width(name).min(COLUMN_ROOM));
        let widest = widest.fold(0.0, f64::max) + 5.0;
        let steps = [1, 2, 5, 10, 20, 50, 100, 200];
        let every = steps.into_iter().find(|n| column * *n as f64 >= widest);
        Self {
            width: width.max(LEAST_WIDTH),
            left,
            top: if map.title.is_empty() { 4.0 } else { 28.0 },
            column,
            panel,
            line: 2.0 * LINE + ROW * map.rows.len() as f64 + 8.0,
            lines: panels.div_ceil(per_line),
            per_line,
            every: every.unwrap_or(500),
        }
    }

    /// Upper left corner of the cells of a panel.
    fn corner(&self, panel: usize) -> Point {
        let (line, column) = (panel / self.per_line, panel % self.per_line);
        (
            self.left + (self.panel + GAP) * column as f64,
            self.top + self.line * line as f64 + LINE,
        )
    }

    fn cell(&self, corner: Point, row: usize, column: usize) -> Area {
        let (left, top) = (
            corner.0 + self.column * column as f64,
            corner.1 + ROW * row as f64,
        );
        Area {
            left,
            top,
            right: left + self.column,
            bottom: top + ROW,
        }
    }

    /// The first free pixel below the panels.
    fn bottom(&self) -> f64 {
        self.top + self.line * self.lines as f64
    }
}

#[cfg(test)]
mod tests {
    use super::super::well_formed::{Element, check};
    use super::*;

    fn map(rows: usize, columns: usize, panels: usize) -> HeatMap {
        let panel = |p: usize| HeatPanel {
            title: format!("step {p}"),
            values: (0..rows)
                .map(|r| (0..columns).map(|c| Some((p + r + c) as f64)).collect())
                .collect(),
            titles: Vec::new(),
        };
        HeatMap {
            title: "Alignment".to_string(),
            rows: (0..rows).map(|r| format!("site_{r}")).collect(),
            columns: (0..columns).map(|c| c.to_string()).collect(),
            column_title: "Layer".to_string(),
            value_title: "Cosine".to_string(),
            range: None,
            panels: (0..panels).map(panel).collect(),
            arrangement: Arrangement::SideBySide,
        }
    }

    fn drawn(map: &HeatMap) -> Vec<Element> {
        let svg = map.svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf\""), "{svg}");
        check(&svg).unwrap()
    }

    fn titles(elements: &[Element]) -> Vec<&str> {
        let titles = elements.iter().filter(|e| e.name == "title");
        titles.map(|e| e.text.as_str()).collect()
    }

    #[test]
    fn ten_panels_of_a_model_are_legible() {
        for arrangement in [Arrangement::SideBySide, Arrangement::Rows] {
            let mut map = map(7, 30, 10);
            map.arrangement = arrangement;
            let elements = drawn(&map);
            let (width, height) = (elements[0].number("width"), elements[0].number("height"));
            assert!(width <= WIDTH + 1.0, "{width}");
            let named: Vec<&Element> = elements
                .iter()
                .zip(elements.iter().skip(1))
                .filter(|(cell, title)| cell.name == "rect" && title.name == "title")
                .map(|(cell, _)| cell)
                .collect();
            assert_eq!(named.len(), 7 * 30 * 10);
            for cell in named {
                assert!(cell.number("width") >= COLUMN && cell.number("height") >= ROW - 0.01);
                assert!(cell.number("x") + cell.number("width") <= width);
                assert!(cell.number("y") + cell.number("height") <= height);
            }
            let areas: Vec<Area> = (0..10)
                .map(|i| {
                    let layout = Layout::new(&map);
                    let (left, top) = layout.corner(i);
                    let last = layout.cell((left, top), 6, 29);
                    Area { left, top, ..last }
                })
                .collect();
            for (i, area) in areas.iter().enumerate() {
                assert!(!areas.iter().skip(i + 1).any(|other| other.overlaps(area)));
            }
        }
    }

    #[test]
    fn cells_are_named_and_colored_by_value() {
        let mut map = map(2, 2, 1);
        map.panels[0].values = vec![vec![Some(0.0), None], vec![Some(1.0), Some(0.5)]];
        map.panels[0].titles = vec![vec![], vec!["own <title>".to_string()]];
        let elements = drawn(&map);
        assert_eq!(
            titles(&elements),
            [
                "step 0\nsite_0, Layer 0: 0",
                "step 0\nsite_0, Layer 1: no value",
                "own &lt;title&gt;",
                "step 0\nsite_1, Layer 1: 0.5",
            ]
        );
        let cells = elements.iter().filter(|e| e.name == "rect").take(4);
        let colors: Vec<&str> = cells.map(|e| e.get("fill")).collect();
        let middle = viridis(0.5);
        assert_eq!(colors, ["#440154", "", "#fde725", middle.as_str()]);
        assert!(
            elements
                .iter()
                .any(|e| e.name == "text" && e.text == "no value")
        );
        assert_eq!(map.svg(), map.svg());
        map.range = Some((1.0, -1.0));
        let cells = drawn(&map);
        let first = cells.iter().find(|e| e.name == "rect").unwrap();
        assert_eq!(first.get("fill"), viridis(0.5));
    }

    #[test]
    fn what_is_not_drawn_is_counted() {
        let mut map = map(2, 3, 2);
        assert_eq!(map.dropped(), 0);
        map.panels[0].values[0][0] = Some(f64::NAN);
        map.panels[1].values[1].push(Some(1.0));
        map.panels[1].values.push(vec![Some(2.0), None]);
        map.panels[0].values[1].truncate(1);
        assert_eq!(map.dropped(), 3);
        let elements = drawn(&map);
        assert!(elements.iter().any(|e| e.text.ends_with("named place: 3")));
        let missing = titles(&elements)
            .iter()
            .filter(|t| t.ends_with("no value"))
            .count();
        assert_eq!(missing, 3);
    }

    #[test]
    fn names_of_columns_do_not_touch() {
        let mut map = map(1, 200, 1);
        map.columns = (0..200).map(|c| format!("layer {c} of 200")).collect();
        let layout = Layout::new(&map);
        assert!(layout.column * layout.every as f64 > COLUMN_ROOM.min(text_width(&map.columns[0])));
        let few = Layout::new(&self::map(1, 12, 1));
        assert_eq!(few.every, 1);
    }

    #[test]
    fn odd_data_still_make_a_chart() {
        let long = "a & <very> long name ".repeat(10);
        for (rows, columns, panels) in [(0, 0, 0), (0, 3, 1), (3, 0, 1), (1, 1, 1), (1, 300, 2)] {
            for value in [None, Some(f64::INFINITY), Some(2.0), Some(f64::MAX)] {
                let mut map = map(rows, columns, panels);
                map.title = long.clone();
                map.rows.iter_mut().for_each(|name| name.clone_from(&long));
                map.columns
                    .iter_mut()
                    .for_each(|name| name.clone_from(&long));
                for cell in map
                    .panels
                    .iter_mut()
                    .flat_map(|p| p.values.iter_mut().flatten())
                {
                    *cell = value;
                }
                for range in [None, Some((1.0, 1.0)), Some((f64::NAN, 1.0))] {
                    map.range = range;
                    let empty = drawn(&map).iter().any(|e| e.text == "no data");
                    assert_eq!(empty, rows * columns * panels == 0);
                }
            }
        }
        assert!(
            drawn(&HeatMap::default())
                .iter()
                .any(|e| e.text == "no data")
        );
    }
}
