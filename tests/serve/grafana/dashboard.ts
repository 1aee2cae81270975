// The JSON of a dashboard whose panels are "stat" and "timeseries" and whose data source is Prometheus, in the types of
// Grafana's own package: `Dashboard` leaves panels' options open, so theirs are put in.
import { AnnotationContainer, AnnotationQuery, Dashboard, FieldConfig, FieldConfigSource, Panel, RowPanel } from "./node_modules/@grafana/schema/dist/types/raw/dashboard/x/types.gen";
import * as stat from "./node_modules/@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/types.gen";
import * as timeseries from "./node_modules/@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/types.gen";

type Flat<T> = { [K in keyof T]: T[K] }; // of two types of one name, a schema can have one

interface Query { refId: string; expr: string; legendFormat?: string; interval?: string; instant?: boolean; datasource?: { type: "prometheus"; uid: string } }
interface Fields<Custom> extends Omit<FieldConfigSource, "defaults"> { defaults: Omit<FieldConfig, "custom"> & { custom?: Custom } }
interface Of<Type extends string, Options, Custom> extends Omit<Panel, "type" | "options" | "fieldConfig" | "targets"> {
  type: Type;
  options: Partial<Options>; // Grafana fills in the rest
  fieldConfig: Fields<Custom>;
  targets: Query[];
}
interface Annotation extends Omit<AnnotationQuery, "target"> { target: Query; titleFormat?: string }
export interface GatiDashboard extends Omit<Dashboard, "panels" | "annotations"> {
  annotations: Omit<AnnotationContainer, "list"> & { list: Annotation[] };
  panels: (Of<"stat", Flat<stat.Options>, Record<string, never>> | Of<"timeseries", Flat<timeseries.Options>, Flat<timeseries.FieldConfig>> | RowPanel)[];
}
