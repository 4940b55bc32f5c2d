package android.view;

public class View {
    public static final int FOCUS_DOWN = 130;

    public interface OnClickListener { void onClick(View view); }

    public void setOnClickListener(OnClickListener listener) {}
    public boolean post(Runnable action) { return true; }
}
