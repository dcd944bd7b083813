//! Line charts: several series over common axes, with bands, legend and labels at the ends.

use super::axis::Axis;
use super::frame::{Frame, Side, WIDTH, draw_notes, dropped_note};
use super::labels::spread;
use super::marks::Mark;
use super::svg::{LINE, Point, Svg, path, text_width};

/// Up to so many series have labels at their ends.
const LABELED: usize = 6;
/// Room for names in the legend and beside the plot, in pixels.
const LEGEND_ROOM: f64 = 230.0;
const LABEL_ROOM: f64 = 150.0;
/// Series with more points have markers at some of them.
const MARKED: usize = 25;
const MARKERS: usize = 8;
/// Longer lines are drawn through the extremes of so many pieces.
const PIECES: usize = 1000;

/// A line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// x and y, in the order in which they are joined. The line is interrupted where a value cannot
    /// be shown.
    pub points: Vec<(f64, f64)>,
    /// Lower and upper end of the shaded band at each point; empty without a band.
    pub band: Vec<(f64, f64)>,
}

/// Several series over common axes.
///
/// Series differ in color, dashes and markers, so they can be told apart in black and white, too.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LineChart {
    /// Stands above the chart, unless it is empty.
    pub title: String,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
    /// Lines, the last on top.
    pub series: Vec<Series>,
}

impl LineChart {
    /// How many points and ends of bands have no place on the axes: values that are not finite, not
    /// positive on a logarithmic axis, or bands without a point. The chart says so, too.
    pub fn dropped(&self) -> usize {
        let of_series = |series: &Series| {
            let points = series.points.iter().filter(|p| !self.shows(**p)).count();
            let bands = bands(series).filter(|b| !self.shows_band(b)).count();
            let beyond = series.band.len().saturating_sub(series.points.len());
            points + bands + beyond
        };
        self.series.iter().map(of_series).sum()
    }

    /// The chart as an SVG element.
    pub fn svg(&self) -> String {
        let names = self.names();
        let frame = self.frame(&names);
        let legend = if names.len() > 1 {
            legend_places(&names)
        } else {
            Vec::new()
        };
        let rows = legend.last().map_or(0.0, |(_, y)| y + LINE);
        let notes = self.notes();
        let notes_top = frame.bottom() + rows;
        let height = notes_top + LINE * notes.len() as f64 + 4.0;

        let mut svg = Svg::new(WIDTH, height, &self.title);
        frame.draw(&mut svg, self.shown().next().is_some());
        for (i, series) in self.series.iter().enumerate() {
            self.draw_band(&mut svg, &frame, &Mark::new(i), series);
        }
        for (i, name) in names.iter().enumerate() {
            self.draw_line(&mut svg, &frame, i, name);
        }
        for (i, ((x, y), name)) in legend.iter().zip(&names).enumerate() {
            let y = frame.bottom() + y + LINE / 2.0;
            Mark::new(i).sample(&mut svg, (*x, y));
            let at = (x + Mark::SAMPLE + 6.0, y + 4.0);
            svg.text(at, name, LEGEND_ROOM, &[]);
        }
        if names.len() <= LABELED {
            self.draw_labels(&mut svg, &frame, &names);
        }
        draw_notes(&mut svg, notes_top, WIDTH, &notes);
        svg.finish()
    }

    fn notes(&self) -> Vec<String> {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let notes = [
            self.x.beyond_note(points().map(|point| point.0)),
            self.y.beyond_note(points().map(|point| point.1)),
            dropped_note(self.dropped()),
        ];
        notes.into_iter().flatten().collect()
    }

    fn shows(&self, (x, y): (f64, f64)) -> bool {
        self.x.shows(x) && self.y.shows(y)
    }

    fn shows_band(&self, band: &Band) -> bool {
        self.shows((band.x, band.low)) && self.shows((band.x, band.high))
    }

    /// All points and ends of bands that have a place.
    fn shown(&self) -> impl Iterator<Item = (f64, f64)> {
        let points = self.series.iter().flat_map(|s| s.points.iter().copied());
        let ends = self.series.iter().flat_map(bands);
        let ends = ends.filter(move |band| self.shows_band(band));
        let ends = ends.flat_map(|band| [(band.x, band.low), (band.x, band.high)]);
        points.chain(ends).filter(move |point| self.shows(*point))
    }

    fn names(&self) -> Vec<String> {
        let name = |(i, series): (usize, &Series)| match series.name.trim() {
            "" => format!("series {}", i + 1),
            name => name.to_string(),
        };
        self.series.iter().enumerate().map(name).collect()
    }

    fn frame(&self, names: &[String]) -> Frame<'_> {
        let labels = if names.len() <= LABELED { names } else { &[] };
        let widths = labels.iter().map(|name| text_width(name).min(LABEL_ROOM));
        let right = 24.0 + widths.fold(0.0, f64::max);
        let x = Side::new(&self.x, self.shown().map(|(x, _)| x));
        let y = Side::new(&self.y, self.shown().map(|(_, y)| y));
        Frame::new(&self.title, x, y, right)
    }

    fn draw_band(&self, svg: &mut Svg, frame: &Frame<'_>, mark: &Mark, series: &Series) {
        let bands: Vec<Band> = bands(series).collect();
        for run in bands.split(|band| !self.shows_band(band)) {
            let thin = thin_band(run);
            let low = thin.iter().map(|band| frame.at((band.x, band.low)));
            let high = thin.iter().rev().map(|band| frame.at((band.x, band.high)));
            if thin.len() > 1 {
                let looks = [("fill", mark.color), ("fill-opacity", "0.18")];
                svg.path(&(path(low.chain(high)) + " Z"), &looks, "");
            } else {
                // An area without width would not be seen.
                let looks = [
                    ("fill", "none"),
                    ("stroke", mark.color),
                    ("stroke-opacity", "0.5"),
                ];
                let data = path(low.chain(high));
                if !data.is_empty() {
                    svg.path(&data, &looks, "");
                }
            }
        }
    }

    fn draw_line(&self, svg: &mut Svg, frame: &Frame<'_>, index: usize, name: &str) {
        let Some(series) = self.series.get(index) else {
            return;
        };
        let mark = Mark::new(index);
        let count = series.points.iter().filter(|p| self.shows(**p)).count();
        let every = if count <= MARKED {
            1
        } else {
            count.div_ceil(MARKERS)
        };
        // Lines that lie on one another have markers at different places.
        let offset = index * every / self.series.len().max(1);
        let line = [
            ("fill", "none"),
            ("stroke", mark.color),
            ("stroke-width", "2"),
            ("stroke-linejoin", "round"),
            ("stroke-dasharray", mark.dash),
        ];
        svg.group(&[("fill", mark.color)], |svg| {
            let mut before = 0;
            for run in series.points.split(|p| !self.shows(*p)) {
                if run.len() > 1 {
                    let points = thin_line(run).into_iter().map(|p| frame.at(p));
                    svg.path(&path(points), &line, "");
                }
                for (i, point) in run.iter().enumerate() {
                    if run.len() == 1 || (before + i) % every == offset {
                        let title = format!("{name}\n{}", frame.words(*point));
                        svg.path(&mark.outline(frame.at(*point)), &[], &title);
                    }
                }
                before += run.len();
            }
        });
    }

    /// Names beside the plot, as near to the ends of their lines as there is room.
    fn draw_labels(&self, svg: &mut Svg, frame: &Frame<'_>, names: &[String]) {
        let end = |(i, series): (usize, &Series)| {
            let last = series.points.iter().rfind(|p| self.shows(**p));
            last.map(|point| (i, frame.at(*point)))
        };
        let mut ends: Vec<(usize, Point)> =
            self.series.iter().enumerate().filter_map(end).collect();
        ends.sort_by(|(_, a), (_, b)| a.1.total_cmp(&b.1));
        let wanted: Vec<f64> = ends.iter().map(|(_, end)| end.1).collect();
        let heights = spread(&wanted, LINE - 3.0, frame.area.top, frame.area.bottom);
        for ((i, end), y) in ends.into_iter().zip(heights) {
            let leader = [
                ("stroke", Mark::new(i).color),
                ("stroke-opacity", "0.6"),
                ("stroke-dasharray", "1 2"),
            ];
            svg.line(end, (frame.area.right + 8.0, y), &leader);
            let at = (frame.area.right + 12.0, y + 4.0);
            let name = names.get(i).map_or("", String::as_str);
            svg.text(at, name, LABEL_ROOM, &[]);
        }
    }
}

/// The band at one point.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Band {
    x: f64,
    low: f64,
    high: f64,
}

fn bands(series: &Series) -> impl Iterator<Item = Band> {
    let pairs = series.points.iter().zip(&series.band);
    pairs.map(|(&(x, _), &(low, high))| Band { x, low, high })
}

/// The points of a line, or of a long line each piece's lowest and highest, and the last.
fn thin_line(run: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if run.len() <= 2 * PIECES {
        return run.to_vec();
    }
    let mut points: Vec<(f64, f64)> = Vec::new();
    for piece in run.chunks(run.len().div_ceil(PIECES)) {
        let numbered = || piece.iter().map(|point| point.1).enumerate();
        let low = numbered().min_by(|a, b| a.1.total_cmp(&b.1));
        let high = numbered().max_by(|a, b| a.1.total_cmp(&b.1));
        let (low, high) = (low.map_or(0, |l| l.0), high.map_or(0, |h| h.0));
        points.extend(piece.get(low.min(high)));
        if low != high {
            points.extend(piece.get(low.max(high)));
        }
    }
    points.extend(run.last());
    points
}

/// The bands of a line, or of a long line the hull of each piece.
fn thin_band(run: &[Band]) -> Vec<Band> {
    if run.len() <= 2 * PIECES {
        return run.to_vec();
    }
    let pieces = run.chunks(run.len().div_ceil(PIECES));
    let hull = |piece: &[Band]| {
        piece.iter().copied().reduce(|all, band| Band {
            low: all.low.min(band.low),
            high: all.high.max(band.high),
            ..all
        })
    };
    pieces.filter_map(hull).chain(run.last().copied()).collect()
}

/// Left end and top of each entry of a legend, row after row, in pixels.
fn legend_places(names: &[String]) -> Vec<Point> {
    let (mut x, mut y) = (4.0, 0.0);
    let mut places = Vec::new();
    for name in names {
        let width = Mark::SAMPLE + 6.0 + text_width(name).min(LEGEND_ROOM) + 18.0;
        if x + width > WIDTH {
            (x, y) = (4.0, y + LINE);
        }
        places.push((x, y));
        x += width;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::super::well_formed::{Element, check};
    use super::*;

    fn series(name: &str, points: &[(f64, f64)]) -> Series {
        Series {
            name: name.to_string(),
            points: points.to_vec(),
            band: Vec::new(),
        }
    }

    fn chart(series: Vec<Series>) -> LineChart {
        LineChart {
            title: "Loss <of> runs".to_string(),
            x: Axis::linear("Step", ""),
            y: Axis::linear("Loss", "nats"),
            series,
        }
    }

    /// Elements of the chart; no number in it may be other than finite.
    fn drawn(chart: &LineChart) -> Vec<Element> {
        let svg = chart.svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        check(&svg).unwrap()
    }

    fn lines(elements: &[Element]) -> Vec<&Element> {
        let joined = |e: &&Element| e.get("stroke-linejoin") == "round";
        elements.iter().filter(joined).collect()
    }

    /// The numbers of path data of straight lines.
    fn corners(data: &str) -> Vec<f64> {
        let numbers = data.split([' ', 'M', 'L', 'Z']).filter(|n| !n.is_empty());
        numbers.map(|n| n.parse().unwrap()).collect()
    }

    #[test]
    fn lines_go_through_their_points() {
        let chart = chart(vec![series("a", &[(0.0, 2.0), (5.0, 1.0), (10.0, 2.0)])]);
        let names = chart.names();
        let area = chart.frame(&names).area;
        let elements = drawn(&chart);
        let line = corners(lines(&elements)[0].get("d"));
        assert_eq!(line.len(), 6);
        for corner in line.chunks(2) {
            assert!(
                corner[0] >= area.left && corner[0] <= area.right,
                "{corner:?}"
            );
            assert!(
                corner[1] >= area.top && corner[1] <= area.bottom,
                "{corner:?}"
            );
        }
        assert!(line[0] < line[2] && line[2] < line[4]);
        assert!(line[1] < line[3] && line[1] == line[5]);
        let title = elements.iter().find(|e| e.text.starts_with("a\nStep: 5"));
        assert_eq!(title.unwrap().text, "a\nStep: 5\nLoss: 1");
        assert_eq!(chart.svg(), chart.svg());
    }

    #[test]
    fn what_cannot_be_shown_interrupts_the_line_and_is_counted() {
        let mut chart = chart(vec![series(
            "a",
            &[
                (1.0, 1.0),
                (2.0, 2.0),
                (3.0, f64::NAN),
                (4.0, 1.0),
                (5.0, 0.0),
            ],
        )]);
        assert_eq!((chart.dropped(), lines(&drawn(&chart)).len()), (1, 2));
        chart.y.log = true;
        chart.series[0].band = vec![(1.0, 2.0), (0.0, 2.0)];
        // A NaN, a zero, and a band that reaches zero; (4, 1) is now alone.
        assert_eq!((chart.dropped(), lines(&drawn(&chart)).len()), (3, 1));
        let said = drawn(&chart)
            .iter()
            .any(|e| e.text.starts_with("3 values are"));
        assert!(said);
    }

    #[test]
    fn bands_are_areas_and_widen_the_axis() {
        let mut chart = chart(vec![series("a", &[(0.0, 1.0), (1.0, 1.0)])]);
        chart.series[0].band = vec![(0.5, 4.0), (0.0, 8.0)];
        let elements = drawn(&chart);
        let area = chart.frame(&chart.names()).area;
        let band = elements.iter().find(|e| e.get("fill-opacity") == "0.18");
        let band = corners(band.unwrap().get("d"));
        assert_eq!(band.len(), 8);
        for corner in band.chunks(2) {
            assert!(
                corner[1] >= area.top && corner[1] <= area.bottom,
                "{corner:?}"
            );
        }
    }

    #[test]
    fn an_axis_that_ends_earlier_shows_the_rest_at_its_end() {
        let usual = series("usual", &[(0.0, 2.0), (1.0, 1.5), (2.0, 1.0)]);
        let astray = series("astray", &[(0.0, 2.0), (1.0, 900.0), (2.0, 1e7)]);
        let mut chart = chart(vec![usual, astray]);
        chart.series[1].band = vec![(1.0, 3.0), (800.0, 1e3), (1e6, 1e8)];
        chart.y = chart.y.up_to(Some(2.5));
        let names = chart.names();
        let frame = chart.frame(&names);
        // What is usual takes most of the height.
        let height = frame.at((0.0, 1.0)).1 - frame.at((0.0, 2.0)).1;
        assert!(height > 0.5 * frame.area.height(), "{height}");
        assert_eq!(frame.at((2.0, 1e7)).1, frame.at((2.0, 2.5)).1);
        let elements = drawn(&chart);
        let told = "2 values above 2.5 are drawn at the end of the axis: Loss";
        assert!(elements.iter().any(|e| e.text == told));
        // Titles have what they are.
        let title = elements
            .iter()
            .find(|e| e.text.starts_with("astray\nStep: 2"));
        assert_eq!(title.unwrap().text, "astray\nStep: 2\nLoss: 1e7");
        assert_eq!(chart.dropped(), 0);
    }

    #[test]
    fn few_series_have_labels_and_all_are_in_the_legend() {
        for count in [1, 2, 6, 7, 40] {
            let many = (0..count).map(|i| series(&format!("run {i}"), &[(0.0, 1.0), (1.0, 1.0)]));
            let elements = drawn(&chart(many.collect()));
            let named = elements
                .iter()
                .filter(|e| e.name == "text" && e.text == "run 0");
            let (label, legend) = (usize::from(count <= 6), usize::from(count > 1));
            assert_eq!(named.count(), label + legend, "{count}");
            let bottom = elements[0].number("height");
            let texts = elements.iter().filter(|e| e.name == "text");
            for text in texts {
                let (x, y) = (text.number("x"), text.number("y"));
                assert!(
                    (0.0..WIDTH).contains(&x) && y > 0.0 && y < bottom,
                    "{text:?}"
                );
            }
        }
    }

    #[test]
    fn odd_data_still_make_a_chart() {
        let long = "name & <".repeat(200);
        for points in [
            vec![],
            vec![(f64::NAN, 1.0)],
            vec![(3.0, 3.0)],
            vec![(1.0, 2.0), (1.0, 2.0)],
            vec![(f64::MIN, f64::MAX), (-1e300, 1e300)],
        ] {
            for log in [false, true] {
                let mut chart = chart(vec![series(&long, &points), series("", &[])]);
                chart.series[0].band = vec![(f64::NAN, 0.0), (1.0, 1.0), (1.0, 1.0)];
                (chart.x.log, chart.y.log) = (log, log);
                let elements = drawn(&chart);
                let empty = elements.iter().any(|e| e.text == "no data");
                assert_eq!(empty, chart.shown().next().is_none());
            }
        }
        assert!(
            drawn(&LineChart::default())
                .iter()
                .any(|e| e.text == "no data")
        );
    }

    #[test]
    fn long_lines_keep_their_extremes() {
        let mut spiked: Vec<(f64, f64)> = (0..50_000).map(|i| (f64::from(i), 1.0)).collect();
        spiked[12_345].1 = 9.0;
        spiked[23_456].1 = -9.0;
        let thin = thin_line(&spiked);
        assert!(thin.len() <= 2 * PIECES + 1, "{}", thin.len());
        for index in [12_345, 23_456, 49_999] {
            assert!(thin.contains(&spiked[index]), "{index}");
        }
        assert!(thin.is_sorted_by(|a, b| a.0 <= b.0));
        let band = spiked.iter().map(|&(x, y)| Band { x, low: y, high: y });
        let thin = thin_band(&band.collect::<Vec<_>>());
        assert!(thin.len() <= PIECES + 1);
        assert!(thin.iter().any(|b| b.high == 9.0) && thin.iter().any(|b| b.low == -9.0));
        let marks = drawn(&chart(vec![series("a", &spiked)]));
        assert!(marks.iter().filter(|e| e.name == "title").count() <= MARKERS);
    }
}
